"""What touches the world: sockets, threads, clocks and files around the sans-IO machines of `protocol`."""

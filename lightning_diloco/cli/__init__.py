"""The `lightning-diloco` command. It never imports lightning."""

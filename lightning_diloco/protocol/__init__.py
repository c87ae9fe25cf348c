"""The sans-IO core: messages, events, actions, records, and the two machines that every runtime drives.

Nothing here does I/O, reads a clock, draws a random number or imports torch. `SyncerMachine` and `LearnerMachine` take events and
`now_s` and return actions; the network runtime, the simulator, the replay and the tests drive the same few hundred lines.
"""

"""What int8 brings on a GPU: single layers, a model in transformers, experts, host time, accuracy, and the peers.

Each section runs in a process of its own with a time limit (`sections`), and every row is on the disk once it is measured
(`journal`): a kernel that hangs or breaks the device's context costs its section and nothing else. `--dry` runs all of it on a CPU
with tiny sizes, through Triton's interpreter, so that nothing in it runs for the first time on an expensive machine.
"""

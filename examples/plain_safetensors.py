# SPDX-License-Identifier: Apache-2.0
"""Loads every tensor of a safetensors file, read ahead by pagecache_bpf."""

import argparse

from safetensors import safe_open

import pagecache_bpf as pc

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file")
parser.add_argument("--device", help="the accelerator it is for, such as cuda:0")
parser.add_argument("--budget", help='at most so much in the page cache at a time, like "4GiB"')
args = parser.parse_args()

load = pc.load(args.file, devices=args.device, budget=args.budget)
with load, safe_open(args.file, framework="np") as file:
    tensors = {name: file.get_tensor(name) for name in list(file.keys())}

print(f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values())} bytes")
print(load.report())

# SPDX-License-Identifier: Apache-2.0
"""Loads a model with transformers; --without: for comparison, as without pagecache_bpf."""

import argparse
import time

from transformers import AutoModel

import pagecache_bpf as pc

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a directory, or ORG/NAME that is in the Hugging Face cache")
parser.add_argument("--device", default="cpu")
parser.add_argument("--without", action="store_true")
args = parser.parse_args()

started = time.monotonic()
if args.without:
    model = AutoModel.from_pretrained(args.model).to(args.device)
else:
    with pc.load(args.model, devices=args.device) as load:
        pc.phase("weights")  # for a recording, if one is made: pagecache-bpf record
        model = AutoModel.from_pretrained(args.model)
        pc.phase("to the device")
        model = model.to(args.device)
        pc.phase("loaded")
    print(load.report())
seconds = time.monotonic() - started
print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters in {seconds:.2f} s")

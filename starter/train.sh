#!/usr/bin/env bash
# Makes the weights of the starter model again, where `make install` was run: starter/train.sh FLICKR8K
# FLICKR8K is a folder with Images/, captions.txt and the official split files. The last epoch is taken: dev selects
# nothing. float32 and images without variation: the same on any machine, up to the order of additions.
set -euo pipefail
data=$1
model=$(cd "$(dirname "$0")" && pwd)/src/clipvisionalign_starter/model
runs=${RUNS:-runs}
settings=(--best_by last --seed 0 --augment none --precision float32 --trackers "")

# The projection heads over both towers as they are.
clipvisionalign train "$data" --out "$runs/heads" --freeze both --epochs 5 "${settings[@]}"
rm -rf "$model"
clipvisionalign export "$runs/heads" --adapters "$model" --rank 16
clipvisionalign calibrate starter "$data"
clipvisionalign evaluate starter --data "$data"
clipvisionalign audit starter --data "$data"

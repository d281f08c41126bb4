#!/usr/bin/env bash
# Makes the weights of the starter model again, where `make install` was run: starter/train.sh FLICKR8K
# FLICKR8K is a folder with Images/, captions.txt and the official split files. The last epoch is taken: dev selects
# nothing. In float32, the same on any machine up to the order of additions. About an hour of two cores with AVX2.
set -euo pipefail
data=$1
model=$(cd "$(dirname "$0")" && pwd)/src/clipvisionalign_starter/model
runs=${RUNS:-runs}

# The text tower and the heads, over four views of each image by the image tower as it is.
clipvisionalign train "$data" --out "$runs/starter" --freeze image --views 4 --epochs 6 --best_by last --seed 0 \
    --precision float32 --trackers ""
rm -rf "$model"
clipvisionalign export "$runs/starter" --adapters "$model" --megabytes 7.7
clipvisionalign calibrate starter "$data"
clipvisionalign evaluate starter --data "$data"
clipvisionalign audit starter --data "$data"

"""Feature statistics that a Frechet distance compares with: the test split, and the train split for its noise floor.

python examples/make_reference_statistics.py --data FOLDER --features src/stepquant/models/zoo/cifar10_features
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import DEFAULT_DATA, load_split
from safetensors.torch import save_file

from stepquant.evaluate.metrics.classifiers import read_classifier
from stepquant.evaluate.metrics.frechet import Statistics, frechet, merge
from stepquant.evaluate.metrics.reference import REFERENCE_NAME, Split, to_tensors
from stepquant.evaluate.networks.reader import Extractor

# Of the test split; enough for nearest neighbours and kernel distances, and small in the package.
KEPT = 2048


def measure_split(extractor: Extractor, data: Path, name: str, batch: int, keep: int) -> Split:
    images, _ = load_split(data, name)
    blocks, kept = [], []
    for chunk in images.split(batch):
        features = extractor(chunk / 255)
        blocks.append(Statistics.of(features))
        kept.append(features[: keep - sum(map(len, kept))])
    return Split(merge(blocks), torch.cat(kept) if keep else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=Path, required=True, help="folder of the feature network")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of parquet files")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    extractor = read_classifier(args.features.resolve()).extractor()
    splits = {
        name: measure_split(extractor, args.data, name, args.batch, keep)
        for name, keep in (("test", KEPT), ("train", 0))
    }
    file = args.features / REFERENCE_NAME
    save_file(to_tensors(splits), file, metadata={"extractor": extractor.digest})
    file.chmod(0o644)  # safetensors writes for the owner alone
    floor = frechet(splits["train"].statistics, splits["test"].statistics)
    print(f"{file}: extractor {extractor.digest}, {extractor.name} of train against test {floor:.4f}")


if __name__ == "__main__":
    main()

"""Write ``digits.parquet`` anew from the copy of the data that scikit-learn ships.

    python train/assets/make_digits.py

Needs scikit-learn, which nothing else here does. Every third image is a test image: 599 of 1,797, of each digit 51 to
69. (The digits come in rounds of ten for long stretches; a stride that shares a factor with 10 would miss some.)
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

images, labels = load_digits(return_X_y=True)
table = pa.table(
    {
        "image": pa.array(images.astype(np.uint8).tolist(), type=pa.list_(pa.uint8())),
        "label": pa.array(labels.astype(np.uint8)),
        "split": pa.array(["test" if index % 3 == 0 else "train" for index in range(len(labels))]),
    }
)
pq.write_table(table, Path(__file__).with_name("digits.parquet"), compression="zstd")

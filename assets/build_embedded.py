"""Builds assets/embedded: the public-domain documents that `data.dataset = "embedded"` reads.

    python assets/build_embedded.py --corpus FOLDER

FOLDER holds train.parquet and validation.parquet with the columns source, id and text. LICENSES.md says where
the sources that are kept come from.
"""

import argparse
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

SOURCES = ("austen", "moby_dick", "sotu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    corpus = parser.parse_args().corpus
    folder = Path(__file__).resolve().parent / "embedded"
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        table = pq.read_table(
            corpus / f"{split}.parquet", columns=["source", "id", "text"], filters=[("source", "in", SOURCES)]
        )
        table = table.replace_schema_metadata(None)
        # A dictionary of texts that never repeat would only be stored twice over.
        pq.write_table(
            table,
            folder / f"{split}.parquet",
            compression="zstd",
            compression_level=22,
            use_dictionary=["source"],
            write_statistics=False,
        )
        num_bytes = pc.sum(pc.binary_length(table["text"])).as_py()
        print(f"{split}: {len(table)} documents, {num_bytes:,} bytes of text")


if __name__ == "__main__":
    main()

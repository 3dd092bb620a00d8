"""Writes the files beside it: the same rows in every format, each by a program that people use for it.

The versions are those of the day on which the files were made; the tests read the files and need none of this:
python -m venv v && v/bin/pip install pyarrow==26.0.1 pandas==3.1.1 polars==2.1.0 duckdb==2.0.1 datasets==5.2.0 warcio
v/bin/python common/golden/formats/make.py
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile

import datasets
import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

os.chdir(os.path.dirname(os.path.abspath(__file__)))

# What is hard to quote, hard to cut, and longer than what fits into a view or into one byte of a length.
texts = [
    "plain words",
    'commas, "quotes" and\ttabs',
    "two\nlines\r\nand a half",
    "  spaces before and after ",
    "ελληνικά, 中文, €, 😀",
    "the same again",
    "the same again",
    "x" * 300 + " long",
    "{\"json\": [1, 2]}",
    "the same beginning, one end",
    "the same beginning, another end",
    "'single' \\ backslash",
]
docs = [{"id": i, "text": text, "score": i / 4} for i, text in enumerate(texts)]
table = pa.Table.from_pylist(docs)
frame = pandas.DataFrame(docs)

with open("docs.jsonl", "w", encoding="utf-8") as out:
    for row in docs:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")

# Text formats.
with open("docs.csv", "w", encoding="utf-8", newline="") as out:
    writer = csv.DictWriter(out, ["id", "text", "score"])
    writer.writeheader()
    writer.writerows(docs)
frame.to_csv("docs-pandas.tsv", sep="\t", index=False)
frame.to_json("docs-pandas.json", orient="records")
polars.DataFrame(docs).write_csv("docs-polars.csv")
for name, pack in [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]:
    with open("docs.csv", "rb") as source, open(f"docs.csv.{name}", "wb") as out:
        out.write(pack(source.read()))

# Records of the web, each a member of a gzip file as Common Crawl has them.
with open("docs.warc.wet.gz", "wb") as out:
    warc = WARCWriter(out, gzip=True)
    warc.write_record(warc.create_warcinfo_record("docs.warc.wet.gz", {"software": "warcio"}))
    for row in docs:
        payload = io.BytesIO(row["text"].encode())
        warc.write_record(
            warc.create_warc_record(
                f"http://localhost/{row['id']}",
                "conversion",
                payload=payload,
                warc_content_type="text/plain",
            )
        )

# Parquet: packings, versions of pages, encodings, and many row groups and pages.
for codec in ["none", "snappy", "gzip", "zstd", "lz4"]:
    pq.write_table(table, f"docs-{codec}.parquet", compression=codec)
pq.write_table(table, "docs-v2.parquet", data_page_version="2.0", version="2.6", compression="zstd")
for encoding in ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"]:
    pq.write_table(
        table,
        f"docs-{encoding.lower().replace('_', '-')}.parquet",
        use_dictionary=False,
        column_encoding={
            "text": encoding,
            "id": "DELTA_BINARY_PACKED",
            "score": "BYTE_STREAM_SPLIT",
        },
    )
pq.write_table(table, "docs-pages.parquet", row_group_size=5, data_page_size=1, write_batch_size=2)
polars.DataFrame(docs).write_parquet("docs-polars.parquet")
duckdb.from_arrow(table).write_parquet("docs-duckdb.parquet")

# Arrow: streams, files, packed buffers, views, dictionaries.
def ipc(name, table, new=pa.ipc.new_stream, rows=5, **options):
    with new(name, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)


ipc("docs-stream.arrow", table)
ipc("docs-file.arrow", table, pa.ipc.new_file)
ipc("docs-zstd.arrow", table, pa.ipc.new_file, compression="zstd")
ipc("docs-lz4.arrow", table, rows=100, compression="lz4")
index = table.schema.get_field_index("text")
ipc(
    "docs-dictionary.arrow",
    table.set_column(index, "text", table["text"].dictionary_encode()),
)
ipc("docs-large.arrow", table.set_column(index, "text", table["text"].cast(pa.large_string())))
polars.DataFrame(docs).write_ipc("docs-polars.arrow", compression="uncompressed")
pandas.DataFrame(docs).to_feather("docs-pandas.feather")
with tempfile.TemporaryDirectory() as folder:
    datasets.Dataset.from_list(docs).save_to_disk(folder)
    shutil.copy(f"{folder}/data-00000-of-00001.arrow", "docs-datasets.arrow")

# Rows with everything in them that a JSON object can say, and some that it cannot.
turn = pa.struct([("role", pa.string()), ("content", pa.string())])
schema = pa.schema(
    [
        ("messages", pa.list_(turn)),
        ("n", pa.int8()),
        ("big", pa.uint64()),
        ("half", pa.float32()),
        ("yes", pa.bool_()),
        ("tags", pa.list_(pa.list_(pa.string()))),
        ("facts", pa.map_(pa.string(), pa.int32())),
        ("nested", pa.struct([("a", pa.struct([("b", pa.string())])), ("c", pa.list_(pa.int64()))])),
        ("nothing", pa.null()),
        ("raw", pa.binary()),
        ("day", pa.date32()),
    ]
)


def row(i):
    turns = [
        {"role": "user" if t % 2 == 0 else "assistant", "content": f"turn {t} of {i}"}
        for t in range(i % 4)
    ]
    return {
        "messages": None if i == 5 else turns,
        "n": None if i % 3 == 0 else -i,
        "big": 2**64 - 1 - i,
        "half": i / 2,
        "yes": None if i == 4 else i % 2 == 0,
        "tags": [None, [], ["a", None, "b"]][: i % 4] if i != 7 else None,
        "facts": None if i == 2 else [(f"k{j}", None if j == 1 else j) for j in range(i % 3)],
        "nested": None
        if i == 3
        else {"a": None if i == 1 else {"b": None if i == 6 else f"b{i}"}, "c": list(range(i % 5))},
        "nothing": None,
        "raw": b"\xff",
        "day": None,
    }


rows = [row(i) for i in range(12)]
nested = pa.Table.from_pylist(rows, schema=schema)
with open("nested.jsonl", "w", encoding="utf-8") as out:
    for row in nested.to_pylist(maps_as_pydicts="strict"):
        del row["raw"], row["day"]
        out.write(json.dumps(row) + "\n")
pq.write_table(nested, "nested.parquet")
pq.write_table(
    nested,
    "nested-v2.parquet",
    data_page_version="2.0",
    use_dictionary=False,
    row_group_size=5,
    data_page_size=1,
    write_batch_size=2,
    compression="snappy",
)
ipc("nested.arrow", nested)
ipc("nested-file.arrow", nested, pa.ipc.new_file, compression="zstd")

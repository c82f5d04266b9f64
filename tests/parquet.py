"""Writes tests/data/records.*: the same records as lines of JSON and as Parquet, as pyarrow stores them.

    python tests/parquet.py

needs pyarrow. The suite compares what becomes of them and needs no Python. What a record has not is null in Parquet.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent / "data"

RECORDS = [
    {"prompt": "Which bay takes frozen goods?", "completion": "Bay seven, between four and six in the morning."},
    {"prompt": "Wer zahlt die Zollgebühr?", "completion": "Der Empfänger – außer bei Rücksendungen."},
    {
        "messages": [
            {"role": "system", "content": "Answer as the harbour office does."},
            {"role": "user", "content": "Is berth 3 free?"},
            {"role": "assistant", "content": "From noon on.", "weight": 0},
            {"role": "user", "content": "And berth 4?"},
            {"role": "assistant", "content": "Not before Thursday.", "weight": 1},
        ]
    },
    {"prompt": "What is the pilot's channel?", "completion": "Channel 12.\nOn Sundays, channel 14."},
    {"messages": [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "High at 05:40 \"local\"."}]},
]

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("completion", pa.large_string()),
        (
            "messages",
            pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())])),
        ),
    ]
)


def main():
    FOLDER.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    (FOLDER / "records.jsonl").write_text(lines, encoding="utf-8")
    table = pa.Table.from_pylist(RECORDS, schema=SCHEMA)
    for compression in ["snappy", "zstd", "gzip", "none"]:
        # Row groups of two, so that there are several.
        pq.write_table(table, FOLDER / f"records-{compression}.parquet", compression=compression, row_group_size=2)
    nothing = pa.table({"prompt": ["What is it?", "Who?"], "completion": pa.array([b"\xff\xfe", None], pa.binary())})
    pq.write_table(nothing, FOLDER / "bytes.parquet")


if __name__ == "__main__":
    main()

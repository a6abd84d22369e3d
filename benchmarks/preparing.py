"""How long data take to prepare: Galley, TRL, and nothing but rendering and tokenising, on the same rows and cores.

    python benchmarks/preparing.py --model FOLDER --rows 10000 --processes 2

``FOLDER`` has a model with a fast tokenizer and a chat template. Each contestant runs in a process of its own, in turn,
``--rounds`` times; what it imports and loads before it begins with the rows is not counted. The best round counts.

- *galley*: read, render, tokenise, mask, pack and write (``prepare_arrays``, with an empty cache).
- *trl*: ``SFTTrainer``'s own preparation of prompt and completion (``dataset_num_proc`` processes), packed by
  best-fit-decreasing; reading the file is not counted.
- *bare*: ``apply_chat_template`` and one ``encode_batch`` in each of the processes; no mask, nothing packed or written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_LENGTH = 1024
CONTESTANTS = ("galley", "trl", "bare")


def write_rows(path: Path, count: int) -> None:
    """``count`` rows: the documentation of the standard library as conversations, again and again, numbered."""
    from rows import make

    rows = make(10**9)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = rows[number % len(rows)]["messages"]
            asked = {"role": "user", "content": f"{number}. {question['content']}"}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")


def galley(model: str, rows: Path, _processes: int, folder: Path) -> float:
    """Seconds of ``prepare_arrays``."""
    os.environ["GALLEY_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    from galley.prepare import arrays, prepare
    from galley_launch.base.options import read
    from galley_launch.plan.compose import compose

    words = [f"model.path={model}", f"data.path={rows}", f"max_length={MAX_LENGTH}", "data.held_out=0", "device=cpu"]
    composed = compose("smollm2-135m-lora", read(words), imagine=True)
    took, inner = [], arrays.prepare_arrays

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = inner(*arguments)
        took.append(time.perf_counter() - began)
        return result

    arrays.prepare_arrays = timed
    prepare.make(composed.spec, composed.run)
    return took[0]


def trl(model: str, rows: Path, processes: int, folder: Path) -> float:
    """Seconds of ``SFTTrainer``'s preparation."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    lines = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    data = datasets.Dataset.from_list([{"prompt": pair[:1], "completion": pair[1:]} for pair in lines])
    options = {"dataset_num_proc": processes, "max_length": MAX_LENGTH, "packing": True, "packing_strategy": "bfd"}
    config = SFTConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **options)
    took, inner = [], SFTTrainer._prepare_dataset

    def timed(*arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        result = inner(*arguments, **more)
        took.append(time.perf_counter() - began)
        return result

    SFTTrainer._prepare_dataset = timed
    tokenizer = AutoTokenizer.from_pretrained(model)
    SFTTrainer(AutoModelForCausalLM.from_pretrained(model), config, train_dataset=data, processing_class=tokenizer)
    return sum(took)


def bare(model: str, rows: Path, processes: int, _folder: Path) -> float:
    """Seconds of rendering and tokenising alone, each process a slice of the rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]

    def encode(part: int) -> None:
        texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in lines[part::processes]]
        tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    began = time.perf_counter()
    workers = [multiprocessing.get_context("fork").Process(target=encode, args=(part,)) for part in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def peak_gb() -> float:
    """Most memory of this process or of one of its children, in GB."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1e6


def measure(options: argparse.Namespace, contestant: str, rows: Path) -> dict[str, float]:
    """Seconds and peak memory of one contestant, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", options.model, "--processes", str(options.processes), "--as", contestant]
        command = [sys.executable, __file__, *words, "--file", str(rows), "--folder", folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.processes), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result


def main() -> None:
    """Run all contestants and print a table, or one and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    for hidden in ("--as", "--file", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = vars(options)["as"]
    if chosen:
        work = {"galley": galley, "trl": trl, "bare": bare}[chosen]
        seconds = work(options.model, Path(options.file), options.processes, Path(options.folder))
        print(json.dumps({"seconds": seconds, "peak_gb": peak_gb()}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, options.rows)
        best: dict[str, dict[str, float]] = {}
        for _ in range(options.rounds):
            for contestant in options.contestants.split(","):
                found = measure(options, contestant, rows)
                before = best.get(contestant, found)
                best[contestant] = min(found, before, key=lambda figures: figures["seconds"])
        size = rows.stat().st_size / 1e6
    print(f"{options.rows:,} rows, {size:.0f} MB, {options.processes} processes, load before {os.getloadavg()[0]:.1f}")
    print("| | seconds | rows/s | peak GB | Galley's speed beside it |\n|---|---|---|---|---|")
    for name, figures in best.items():
        ratio = figures["seconds"] / best["galley"]["seconds"] if "galley" in best else float("nan")
        rate = options.rows / figures["seconds"]
        print(f"| {name} | {figures['seconds']:.1f} | {rate:,.0f} | {figures['peak_gb']:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

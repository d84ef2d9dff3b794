# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What the tests ran on: ``doctor`` compares the installed versions with it, docs/releases.md has it as a table."""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Tuple


class Stack(NamedTuple):
    """A set of versions that belong together, and what ran on it. date: the last run."""

    python: str
    versions: Dict[str, str]
    ran: str
    date: str


STACKS: Tuple[Stack, ...] = (
    Stack(
        "3.11",
        {
            "torch": "2.13.0",
            "triton": "3.7.1",
            "transformers": "5.17.0",
            "trl": "1.15.0",
            "peft": "0.21.2",
            "bitsandbytes": "0.50.2",
        },
        "all tests and the demo, on the CPU (scripts/requirements.lock)",
        "2026-11-26",
    ),
    Stack(
        "3.13",
        {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.17.0", "trl": "1.15.0"},
        "all tests and the demo, on the CPU (scripts/requirements.lock)",
        "2026-11-26",
    ),
    Stack(
        "3.12",
        {
            "torch": "2.14.1",
            "triton": "3.8.0",
            "transformers": "5.17.0",
            "trl": "1.15.0",
            "peft": "0.21.2",
            "bitsandbytes": "0.50.2",
        },
        "README's install, SFTTrainer in 4 bits, the patches' tests in all forms, on the CPU",
        "2026-11-26",
    ),
    Stack(
        "3.11",
        {"torch": "2.13.0", "transformers": "5.5.0", "trl": "1.0.0"},
        "demo, trainer, template and loss tests on the CPU (scripts/overlay.sh 5.5.0)",
        "2026-11-26",
    ),
    Stack(
        "3.11",
        {"torch": "2.13.0", "transformers": "4.57.6", "trl": "0.24.0"},
        "demo, trainer, template and loss tests on the CPU (scripts/overlay.sh 4.57.6)",
        "2026-11-26",
    ),
    Stack(
        "3.12",
        {"torch": "2.11.0", "triton": "3.6.0"},
        "tests and benchmarks on GPUs (docs/gpu_tests.md)",
        "2026-11-25",
    ),
)


def tested_range(package: str) -> Tuple[str, str]:
    """(oldest, newest) version of a package that tests ran on; empty for one that no stack names."""
    known = [stack.versions[package] for stack in STACKS if package in stack.versions]
    known.sort(key = numbers)
    return (known[0], known[-1]) if known else ("", "")


def tested_text(package: str) -> str:
    """``2.11.0 to 2.14.1``, or the one version; empty as above."""
    return " to ".join(dict.fromkeys(filter(None, tested_range(package))))


def tested_pythons() -> List[str]:
    return sorted({stack.python for stack in STACKS}, key = numbers)


def newest_date() -> str:
    return max(stack.date for stack in STACKS)


def numbers(version: str) -> List[int]:
    """Of a public version: ``2.13.0+cpu`` is 2.13.0."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def outside(package: str, version: str) -> bool:
    """Older or newer than all that was tested; a patch release of the newest is not."""
    oldest, newest = tested_range(package)
    if not oldest:
        return False
    return not numbers(oldest) <= numbers(version) or numbers(version)[:2] > numbers(newest)[:2]

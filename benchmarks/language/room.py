"""Whether the folder of the results is writable and its disk has enough free space, checked before any training."""

import shutil
import uuid
from pathlib import Path

from benchmarks.language.presets import Preset
from benchmarks.output.records import RESULTS, WriteError, replacing, writing

#: Bytes of a parameter in a checkpoint: 4 for the weight, and up to 12 for the optimizer's state.
CHECKPOINT_BYTES = 16
CHECKPOINTS = 2  # of each worker: the old checkpoint stays until the new one is complete
RESULTS_BYTES = 16 * 2**20  # rows, tables and plots


def check_room(out: Path, preset: Preset, vocab_size: int, workers: int) -> None:
    """Make the folder, write a small file beside rows and checkpoints, and open the file of rows if there is one.

    Raises:
        benchmarks.output.records.WriteError: if that fails, or if less than `room_needed` is free on the disk.
    """
    for folder in (out, out / "checkpoints"):
        probe = folder / f".probe-{uuid.uuid4().hex[:8]}"  # ranks of one job look at the same time
        with replacing(probe) as partial:
            partial.write_bytes(b"can this be written?")
        probe.unlink()
    if (out / RESULTS).exists():
        with writing(out / RESULTS):
            (out / RESULTS).open("ab").close()
    free, needed = shutil.disk_usage(out).free, room_needed(preset, vocab_size, workers)
    if free < needed:
        raise WriteError(
            f"only {_megabytes(free)} are free there, results and checkpoints take about {_megabytes(needed)}"
        )


def room_needed(preset: Preset, vocab_size: int, workers: int) -> int:
    """Bytes for the results and for two checkpoints of every worker.

    The number of parameters is estimated: 2 V d for embedding and head, and 4 d^2 + 3 d d_ff for each layer.
    """
    d = preset.d_model
    parameters = 2 * vocab_size * d + preset.n_layers * (4 * d**2 + 3 * d * (preset.d_ff or 4 * d))
    return RESULTS_BYTES + workers * CHECKPOINTS * CHECKPOINT_BYTES * parameters


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB"

"""The trained rows of `MATT` on disk."""

from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file

from matt_fast.reference.config import MATTConfig
from matt_fast.support.files import whole_file
from matt_fast.training.sides import Student
from matt_fast.training.state import Progress


class Checkpoints:
    """The trained rows on disk, every so many steps: the best by loss, and the last."""

    def __init__(self, config: MATTConfig, student: Student, accelerator: Accelerator):
        self.folder, self.keep = Path(config.checkpoint_output_dir), config.save_top_k
        self.student, self.accelerator = student, accelerator
        self.kept: list[tuple[float, Path]] = []

    def save(self, progress: Progress) -> None:
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: table.weight().cpu().contiguous()
            for name, table in zip(("input_embeddings", "output_embeddings"), self.student.tables, strict=False)
        }
        names = [self.folder / "last.safetensors"]
        if self.keep != 0:
            names.append(self.folder / f"step{progress.step}_loss{progress.loss:.4g}.safetensors")
            self.kept.append((progress.loss, names[-1]))
        for name in names:
            with whole_file(name) as part:
                save_file(tensors, part)
        while 0 < self.keep < len(self.kept):
            worst = max(self.kept)
            worst[1].unlink(missing_ok=True)
            self.kept.remove(worst)

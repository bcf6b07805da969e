"""Train runs in a pool of ranks, each rank in a working directory and a cache of its own."""

import shutil

from tests.distributed.run_cases import full_settings, results


class RankRuns:
    """Runs over a number of ranks, below one folder."""

    def __init__(self, pool, inputs, folder):
        self.pool = pool
        self.inputs = inputs
        self.folder = folder

    def arguments(self, name, changes, *, each=None, **others):
        """Return what each rank is called with: the settings, and its folders.

        Args:
            each: settings of one rank each; paths are relative to its working directory.
        """
        folders = [self.folder / name / f"rank-{rank}" for rank in range(self.pool.count)]
        for folder in folders:
            for part in ("work", "temporary"):
                (folder / part).mkdir(parents=True, exist_ok=True)
        return [
            {
                "settings": full_settings(self.inputs, changes) | (each[rank] if each else {}),
                "folder": str(folder),
                **others,
            }
            for rank, folder in enumerate(folders)
        ]

    def train(self, name, changes, *, start=None, **others):
        """Train a run on all ranks; return the folder of its results on rank 0.

        Args:
            name: of a new folder.
            changes: settings that are not the basic ones.
            start: run folder that is copied to rank 0 and resumed.
            others: `stop_after` and `stop_rank`: step after which a rank asks for a stop.
        """
        arguments = self.arguments(name, changes, resume=start is not None, **others)
        run = self.folder / name / "rank-0" / "work" / "run"
        if start is not None:
            shutil.copytree(start, run)
        ends = self.pool.values("train", arguments)
        assert all(end == ends[0] for end in ends), "the ranks end with different policies"
        for rank in range(1, self.pool.count):
            folder = self.folder / name / f"rank-{rank}"
            left = [*(folder / "work").rglob("*"), *(folder / "temporary").rglob("*")]
            assert left == [], f"rank {rank} left files behind: {left[:3]}"
        return run

    def results(self, name, changes, **others):
        """Train a run and return its results; its folders are removed."""
        found = results(self.train(name, changes, **others))
        shutil.rmtree(self.folder / name)
        return found

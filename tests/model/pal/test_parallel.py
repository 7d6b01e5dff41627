"""DDP and FSDP2: processes that train together, of which some have batches without audio."""

import torch


def test_one_process_hears_and_one_does_not(tmp_path):
    """Losses are those of one process, gradients their mean; where nobody hears, audio's weights get zeros. A model
    that is sharded generates what the whole one does."""
    from support.parallel import run

    torch.multiprocessing.spawn(run, args=(str(tmp_path),), nprocs=2)
    assert (tmp_path / "done").exists()

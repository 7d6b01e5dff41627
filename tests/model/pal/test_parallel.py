"""DDP and FSDP2: processes that train together, of which some have batches without audio."""

from support.processes import run_in_two


def test_one_process_hears_and_one_does_not(tmp_path):
    """Losses are those of one process, gradients their mean; where nobody hears, audio's weights get zeros. A model
    that is sharded generates what the whole one does."""
    from support.parallel import run

    run_in_two(run, str(tmp_path))
    assert (tmp_path / "done").exists()

from __future__ import annotations

import torch

from host_cuda.emulator import launch


def test_advance() -> None:
    for rows in (1, 7, 300):
        drawn, running = torch.randint(10, (rows,)), torch.rand(rows) < 0.7
        lengths, stops = torch.randint(100, (rows,)), torch.tensor([3, 8])
        tokens, before = torch.full((rows,), -1), running.clone()
        launch(
            "advance",
            drawn=drawn,
            stops=stops,
            tokens=tokens,
            running=running,
            key_lengths=(new_lengths := lengths.clone()),
            rows=rows,
            stop_count=2,
            pad=0,
            max_blocks=2,
        )
        assert torch.equal(tokens, torch.where(before, drawn, 0))
        assert torch.equal(running, before & ~torch.isin(tokens, stops))
        assert torch.equal(new_lengths, lengths + 1)

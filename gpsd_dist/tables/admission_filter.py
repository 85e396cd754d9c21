"""Counts ids that have no row yet, so that only ids that occur often enough are admitted to a managed table."""

import torch

NO_ID = torch.iinfo(torch.int64).max  # Marks an empty slot; it sorts behind all ids


class AdmissionFilter:
    """Keeps at most `capacity` ids. The ones unseen for longest leave first, then the rarest, then the largest ids."""

    def __init__(self, capacity: int, device: torch.device):
        self._ids = torch.full((capacity,), NO_ID, device=device)  # ascending
        self._counts = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._last_seen = torch.zeros(capacity, dtype=torch.int64, device=device)

    def counts_of(self, id_U: torch.Tensor) -> torch.Tensor:
        """Returns the occurrences so far, int64 [U]; 0 for an id that is not counted here."""
        place_U, is_here_U = self._find(id_U)
        return torch.where(is_here_U, self._counts[place_U], 0)

    def put(self, id_U: torch.Tensor, count_U: torch.Tensor, waits_U: torch.Tensor, now: int) -> None:
        """Sets the counts of distinct ids that were seen in update `now`; ids with `waits_U` False are removed."""
        place_U, is_here_U = self._find(id_U)
        stays = self._ids != NO_ID
        stays[place_U[is_here_U]] = False
        ids = torch.cat([self._ids[stays], id_U[waits_U]])
        counts = torch.cat([self._counts[stays], count_U[waits_U]])
        last_seen = torch.cat([self._last_seen[stays], torch.full_like(id_U[waits_U], now)])
        if len(ids) > len(self._ids):
            best = ids.argsort(stable=True)  # stable sorts, least important key first: together one lexicographic sort
            best = best[counts[best].argsort(descending=True, stable=True)]
            best = best[last_seen[best].argsort(descending=True, stable=True)][: len(self._ids)]
            ids, counts, last_seen = ids[best], counts[best], last_seen[best]
        order = ids.argsort()
        live = (self._ids, ids, NO_ID), (self._counts, counts, 0), (self._last_seen, last_seen, 0)
        for stored, values, empty in live:
            stored[: len(order)] = values[order]
            stored[len(order) :] = empty

    def _find(self, id_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place_U = torch.searchsorted(self._ids, id_U).clamp(max=len(self._ids) - 1)
        return place_U, self._ids[place_U] == id_U

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the live tensors; a checkpoint is loaded into them in place."""
        return {"ids": self._ids, "counts": self._counts, "last_seen": self._last_seen}

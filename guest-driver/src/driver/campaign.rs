//! What [`Strategy::Direct`](super::Strategy::Direct) has to choose from and what it has chosen, until something
//! changes: found once, not again for each range.

use alloc::collections::BTreeMap;

use virtio_mem_wire::BlockRange;

use super::plan::direct::Candidates;

/// What candidates are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Plugging, where units may be added, or only into those that are there.
    Plug { may_be_added: bool },
    /// Taking, to unplug.
    Take,
}

/// A change of size that is under way.
#[derive(Debug, Default)]
pub(super) struct Campaign {
    candidates: Option<(Purpose, Candidates)>,
    /// Pieces that are to be taken: first block and number of blocks.
    chosen: BTreeMap<u64, u64>,
    chosen_blocks: u64,
}

impl Campaign {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The candidates, made anew if there are none for this purpose.
    pub(super) fn candidates(
        &mut self,
        purpose: Purpose,
        make: impl FnOnce() -> Candidates,
    ) -> &mut Candidates {
        if matches!(&self.candidates, Some((known, _)) if *known != purpose) {
            self.clear();
        }
        let (_, candidates) = self.candidates.get_or_insert_with(|| (purpose, make()));
        candidates
    }

    /// Adds pieces, which do not overlap, to what is to be taken.
    pub(super) fn add(&mut self, pieces: &[BlockRange]) {
        for piece in pieces {
            self.chosen.insert(piece.first, piece.count);
            self.chosen_blocks += piece.count;
        }
    }

    pub(super) fn chosen_blocks(&self) -> u64 {
        self.chosen_blocks
    }

    /// The highest piece.
    pub(super) fn next(&self) -> Option<BlockRange> {
        let (&first, &count) = self.chosen.last_key_value()?;
        Some(BlockRange { first, count })
    }

    /// Takes the end of a piece off the list.
    pub(super) fn remove_end(&mut self, range: BlockRange) {
        let piece = self.chosen.range_mut(..=range.first).next_back();
        let Some((&first, count)) = piece.filter(|(first, count)| **first + **count == range.end())
        else {
            return;
        };
        *count = range.first - first;
        let empty = *count == 0;
        self.chosen_blocks -= range.count;
        if empty {
            self.chosen.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange { first, count }
    }

    #[test]
    fn highest_piece_goes_first_and_from_its_end() {
        let mut campaign = Campaign::default();
        campaign.add(&[range(10, 5), range(40, 8), range(20, 2)]);
        assert_eq!(
            (campaign.chosen_blocks(), campaign.next()),
            (15, Some(range(40, 8)))
        );
        campaign.remove_end(range(45, 3));
        assert_eq!(
            (campaign.chosen_blocks(), campaign.next()),
            (12, Some(range(40, 5)))
        );
        campaign.remove_end(range(40, 5));
        assert_eq!(
            (campaign.chosen_blocks(), campaign.next()),
            (7, Some(range(20, 2)))
        );
        // What is in no piece is not there to be removed.
        campaign.remove_end(range(30, 1));
        assert_eq!(campaign.chosen_blocks(), 7);
    }
}

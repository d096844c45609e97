//! Numbers of pieces as what a request says: ranges of contents.
//!
//! Invariant: what fits into one request is decided here, by its bounds.

use super::Engine;
use crate::{
    content::Layout,
    peer::fetch::{contents::Position, source::Wanted},
    proto::{MAX_CLAIM, MAX_RANGES},
};

impl<H> Engine<H> {
    /// These numbers as ranges of contents, each with the content's position; the last one says how many of the numbers fit
    /// into one request.
    pub fn ranges(&self, numbers: &[u32]) -> (Vec<Wanted>, Vec<Position>, usize) {
        let (mut claim, mut positions): (Vec<Wanted>, Vec<Position>) = (vec![], vec![]);
        let (mut bytes, mut taken) = (0, 0);
        for number in numbers {
            let Some((at, first)) = self.contents.locate(*number) else {
                break;
            };
            let Some(layout) = self.layout(at) else { break };
            bytes += u64::from(layout.len_of(first));
            if taken > 0 && (bytes > MAX_CLAIM || claim.len() == MAX_RANGES) {
                break;
            }
            taken += 1;
            match (claim.last_mut(), positions.last()) {
                (Some(last), Some(same))
                    if *same == at && last.first.get() + last.count == first.get() =>
                {
                    last.count += 1;
                }
                _ => {
                    let id = self.contents.id(at);
                    claim.push(Wanted {
                        id,
                        layout,
                        first,
                        count: 1,
                    });
                    positions.push(at);
                }
            }
        }
        (claim, positions, taken)
    }

    /// Bytes of these pieces together.
    pub fn bytes(&self, numbers: &[u32]) -> u32 {
        let len = |number: &u32| {
            let (at, piece) = self.contents.locate(*number)?;
            Some(u64::from(self.layout(at)?.len_of(piece)))
        };
        u32::try_from(numbers.iter().filter_map(len).sum::<u64>()).unwrap_or(u32::MAX)
    }

    fn layout(&self, at: Position) -> Option<Layout> {
        Some(self.contents.opened(at)?.layout)
    }
}

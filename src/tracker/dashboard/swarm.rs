//! The swarm as a picture: who sends to whom, and how much. Pure.
//!
//! Invariant: the picture has a bounded number of nodes and lines, whatever peers say; what is left out is in the node of
//! "others" and in the sums. A line is what its receiver says, so nobody's rate is counted twice.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use serde::Serialize;

use super::files::Listing;
use crate::{
    identity::PeerId,
    tracker::activity::{Heard, Transfer},
};

/// Peers that are drawn one by one.
const NODES: usize = 40;
const LINES: usize = 160;
/// Downloads listed beside the picture.
const TRANSFERS: usize = 100;
/// Sources of each.
const SOURCES: usize = 8;

#[derive(Debug, Default, Serialize)]
pub(super) struct SwarmView {
    /// Those that move most.
    nodes: Vec<Node>,
    /// The other ones that move bytes, as one.
    others: Node,
    n_others: usize,
    lines: Vec<Line>,
    transfers: Vec<Download>,
    n_transfers: usize,
    /// Peers that send or receive.
    n_moving: usize,
    /// Bytes a second of all transfers.
    rate: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Node {
    /// None: the others.
    peer_id: Option<String>,
    send_rate: u64,
    receive_rate: u64,
    /// Of its downloads.
    bytes_done: u64,
    bytes_total: u64,
    files: usize,
}

/// A flow; the ends are positions in `nodes`, and none for the others.
#[derive(Debug, Serialize)]
struct Line {
    from: Option<usize>,
    to: Option<usize>,
    rate: u64,
}

#[derive(Debug, Serialize)]
struct Download {
    peer_id: String,
    content_id: Option<String>,
    name: Option<String>,
    bytes_total: u64,
    bytes_done: u64,
    files_total: u64,
    files_done: u64,
    rate: u64,
    n_sources: usize,
    sources: Vec<Sender>,
}

#[derive(Debug, Serialize)]
struct Sender {
    peer_id: String,
    rate: u64,
}

impl SwarmView {
    /// The picture of what these peers say; only those in `online` (with their number of files) are drawn.
    pub(super) fn new(
        heard: &HashMap<PeerId, Heard>,
        online: &HashMap<PeerId, usize>,
        listing: &Listing,
    ) -> Self {
        let mut transfers: Vec<(PeerId, &Transfer)> = heard
            .iter()
            .filter(|(peer, _)| online.contains_key(peer))
            .filter_map(|(peer, heard)| Some((*peer, heard.report.as_ref()?)))
            .flat_map(|(peer, report)| {
                report
                    .transfers
                    .iter()
                    .map(move |transfer| (peer, transfer))
            })
            .collect();
        transfers.sort_by_key(|(peer, transfer)| (Reverse(transfer.rate), *peer));
        let mut peers: HashMap<PeerId, Node> = HashMap::new();
        for (to, transfer) in &transfers {
            let node = peers.entry(*to).or_default();
            node.receive_rate += transfer.rate;
            node.bytes_done += transfer.bytes_done;
            node.bytes_total += transfer.bytes_total;
            for (from, rate) in transfer
                .sources
                .iter()
                .filter(|(from, _)| online.contains_key(from))
            {
                peers.entry(*from).or_default().send_rate += rate;
            }
        }
        let (n_moving, n_transfers) = (peers.len(), transfers.len());
        let rate = transfers.iter().map(|(_, transfer)| transfer.rate).sum();
        let mut ranked: Vec<(PeerId, Node)> = peers.into_iter().collect();
        ranked.sort_by_key(|(peer, node)| (Reverse(node.send_rate + node.receive_rate), *peer));
        let rest = ranked.split_off(ranked.len().min(NODES));
        // By id, so that a peer keeps its place while others overtake it.
        ranked.sort_by_key(|(peer, _)| *peer);
        let places = ranked
            .iter()
            .enumerate()
            .map(|(at, (peer, _))| (*peer, at))
            .collect();
        let nodes = ranked.into_iter().map(|(peer, node)| Node {
            peer_id: Some(peer.to_string()),
            files: online.get(&peer).copied().unwrap_or_default(),
            ..node
        });
        Self {
            nodes: nodes.collect(),
            n_others: rest.len(),
            others: rest
                .iter()
                .fold(Node::default(), |sum, (_, node)| sum.with(node)),
            lines: lines(&transfers, &places, online),
            transfers: transfers
                .iter()
                .take(TRANSFERS)
                .map(|(peer, t)| Download::new(*peer, t, listing))
                .collect(),
            n_transfers,
            n_moving,
            rate,
        }
    }
}

/// The strongest flows; those among the others are not drawn.
fn lines(
    transfers: &[(PeerId, &Transfer)],
    places: &HashMap<PeerId, usize>,
    online: &HashMap<PeerId, usize>,
) -> Vec<Line> {
    let mut rates: BTreeMap<(Option<usize>, Option<usize>), u64> = BTreeMap::new();
    for (to, transfer) in transfers {
        let to = places.get(to).copied();
        for (from, rate) in transfer
            .sources
            .iter()
            .filter(|(from, rate)| *rate > 0 && online.contains_key(from))
        {
            let from = places.get(from).copied();
            if from.is_some() || to.is_some() {
                *rates.entry((from, to)).or_default() += rate;
            }
        }
    }
    let mut lines: Vec<Line> = rates
        .into_iter()
        .map(|((from, to), rate)| Line { from, to, rate })
        .collect();
    lines.sort_by_key(|line| Reverse(line.rate));
    lines.truncate(LINES);
    lines
}

impl Node {
    fn with(self, other: &Self) -> Self {
        Self {
            peer_id: None,
            send_rate: self.send_rate + other.send_rate,
            receive_rate: self.receive_rate + other.receive_rate,
            bytes_done: self.bytes_done.saturating_add(other.bytes_done),
            bytes_total: self.bytes_total.saturating_add(other.bytes_total),
            files: self.files + other.files,
        }
    }
}

impl Download {
    fn new(peer: PeerId, transfer: &Transfer, listing: &Listing) -> Self {
        let sender = |(peer, rate): &(PeerId, u64)| Sender {
            peer_id: peer.to_string(),
            rate: *rate,
        };
        Self {
            peer_id: peer.to_string(),
            content_id: transfer.content.map(|content| content.to_string()),
            name: transfer
                .content
                .and_then(|content| listing.name_of(content))
                .map(str::to_owned),
            bytes_total: transfer.bytes_total,
            bytes_done: transfer.bytes_done,
            files_total: transfer.files_total,
            files_done: transfer.files_done,
            rate: transfer.rate,
            n_sources: transfer.sources.len(),
            sources: transfer.sources.iter().take(SOURCES).map(sender).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use super::*;
    use crate::tracker::activity::ActivityReport;

    fn peer(n: u32) -> PeerId {
        PeerId::from_spki(&n.to_be_bytes())
    }

    fn downloads(from: &[u32], rate: u64) -> Heard {
        let sources: Vec<_> = from.iter().map(|n| (peer(*n), rate)).collect();
        let rate = rate * sources.len() as u64;
        let (bytes_total, bytes_done, files_total, files_done) = (10, 5, 1, 0);
        let transfer = Transfer {
            content: None,
            bytes_total,
            bytes_done,
            files_total,
            files_done,
            rate,
            sources,
        };
        Heard {
            at: Instant::now(),
            report: Some(Arc::new(ActivityReport {
                transfers: vec![transfer],
                ..ActivityReport::default()
            })),
        }
    }

    #[test]
    fn the_picture_stays_small_and_its_sums_are_those_of_all() {
        let heard: HashMap<_, _> = (0..600)
            .map(|n| (peer(n), downloads(&[n + 1, n + 2, 700 + n % 9], 7)))
            .collect();
        let online = (0..709).map(|n| (peer(n), 1)).collect();
        let swarm = SwarmView::new(&heard, &online, &Listing::default());
        assert_eq!(
            (swarm.nodes.len(), swarm.transfers.len()),
            (NODES, TRANSFERS)
        );
        assert!(swarm.lines.len() <= LINES);
        assert_eq!(
            (swarm.n_transfers, swarm.n_moving, swarm.n_others),
            (600, 611, 611 - NODES)
        );
        assert_eq!(swarm.rate, 600 * 21);
        let sent =
            swarm.nodes.iter().map(|node| node.send_rate).sum::<u64>() + swarm.others.send_rate;
        assert_eq!(sent, swarm.rate);
        assert!(
            swarm
                .lines
                .iter()
                .all(|line| line.from.or(line.to).is_some_and(|at| at < NODES))
        );
    }

    #[test]
    fn who_is_not_here_is_not_drawn() {
        let heard = [
            (peer(1), downloads(&[2, 9], 7)),
            (peer(3), downloads(&[2], 7)),
        ]
        .into();
        let swarm = SwarmView::new(
            &heard,
            &[(peer(1), 0), (peer(2), 4)].into(),
            &Listing::default(),
        );
        assert_eq!(
            (
                swarm.nodes.len(),
                swarm.lines.len(),
                swarm.n_transfers,
                swarm.n_others
            ),
            (2, 1, 1, 0)
        );
    }
}

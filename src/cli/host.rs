//! What the menu keeps running while it is open: a peer, and the tracker of a network that was started here.
//!
//! Invariant: it is the same tracker and the same peer that `sprat tracker run` and `sprat peer` run; whoever opens a
//! Host stops it.

use std::time::Duration;

use anyhow::Result;

use super::{
    actions::run, commands::Action, ending::exit_code, peer as own_peer, session::Session, status,
    tracker as own_tracker,
};
use crate::{
    config::Service,
    exit::Exit,
    peer::{self, Node, member::tracker_client::TrackerClient},
    tracker::{Keep, Tracker},
};

/// For the link by which this machine joins its own network.
const OWN_LINK_TTL: Duration = Duration::from_secs(600);

/// What runs in this process.
#[derive(Default)]
pub struct Host {
    tracker: Option<Tracker>,
    node: Option<Node>,
}

impl Host {
    /// Has this machine joined a network?
    ///
    /// # Errors
    /// If there is an identity that cannot be used.
    pub async fn is_member(session: &Session) -> Result<bool> {
        let tracker = session.config.peer.tracker.clone();
        match TrackerClient::open(&session.state_dir(Service::Peer)?, tracker).await {
            Ok(_) => Ok(true),
            Err(error) if exit_code(&error) == Exit::Auth as u8 => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Was a network started on this machine whose tracker does not run now?
    ///
    /// # Errors
    /// If the running tracker does not answer, or there is no home folder.
    pub async fn has_idle_tracker(session: &Session) -> Result<bool> {
        let dir = session.state_dir(Service::Tracker)?;
        Ok(dir.is_dir() && status::tracker_status(&dir).await?.is_none())
    }

    /// Is the tracker here, in this process or another?
    #[must_use]
    pub fn has_tracker(session: &Session) -> bool {
        session
            .state_dir(Service::Tracker)
            .is_ok_and(|dir| dir.is_dir())
    }

    /// Starts the tracker, as `sprat tracker run` does.
    ///
    /// # Errors
    /// As that command.
    pub async fn start_tracker(&mut self, session: &Session) -> Result<()> {
        self.tracker = Some(own_tracker::start(session, Keep::default()).await?);
        Ok(())
    }

    /// Makes this machine a member of the network whose tracker runs here.
    ///
    /// # Errors
    /// As `sprat join`.
    pub async fn join_own(&self, session: &Session) -> Result<()> {
        let Some(tracker) = &self.tracker else {
            return Ok(());
        };
        let link = tracker.join_link(1, OWN_LINK_TTL)?;
        run(session, &Action::from_words(&["join".into(), link])?).await
    }

    /// Starts a peer, as `sprat peer` does, unless one runs already.
    ///
    /// # Errors
    /// As that command.
    pub async fn start_peer(&mut self, session: &Session) -> Result<()> {
        if self.node.is_none()
            && peer::attach(&session.state_dir(Service::Peer)?)
                .await?
                .is_none()
        {
            self.node = Some(own_peer::start(session, &session.config.peer.shares).await?);
        }
        Ok(())
    }

    /// Stops what it started, the peer first.
    pub async fn stop(self) {
        if let Some(node) = self.node {
            node.stop().await;
        }
        if let Some(tracker) = self.tracker {
            tracker.stop().await;
        }
    }
}

//! ReportPiece, the receiving end: the source is told of a piece that failed verification.
//!
//! Invariant: nothing depends on whether the source hears it.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::Source;
use crate::{
    content::{ContentId, PieceIndex},
    proto::ReportPieceRequest,
};

/// How long a source may take.
const DEADLINE: Duration = Duration::from_secs(5);

impl Source {
    /// Tells the source that it sent wrong bytes for a piece, so that it looks at its file.
    pub async fn report_piece(&self, content: ContentId, piece: PieceIndex) {
        let request = ReportPieceRequest {
            content_id: Bytes::copy_from_slice(content.as_bytes()),
            piece: piece.get(),
        };
        match timeout(DEADLINE, self.client().report_piece(request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::debug!(peer = %self.id, %status, "reporting a wrong piece"),
            Err(_) => tracing::debug!(peer = %self.id, "reporting a wrong piece: no answer"),
        }
    }
}

//! How a download is shown: bars on a terminal, a line every few seconds without one, events for programs.
//!
//! Invariant: bytes shown are verified bytes. Bars and lines go to standard error, paths of finished files and JSON
//! events to standard output; no more than two progress events a second. What is said to standard output is there after
//! [`ProgressReport::flush`], many lines at a time.

use std::{
    env,
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::Serialize;

mod bars;

use self::bars::Bars;
use super::{
    output::{self, count, note, span},
    words::{describe, in_words, short},
};
use crate::{
    proto::{Done, FileProgress, Progress, SourceProgress, get_event::Event},
    safe_path::escape,
    units::human_size,
};

const JSON_INTERVAL: Duration = Duration::from_millis(500);
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows the events of one download.
pub struct ProgressReport {
    style: Style,
    quiet: bool,
    verbose: bool,
    last: Option<Instant>,
    so_far: Option<Done>,
    /// For standard output.
    waiting: String,
}

/// Bytes of output that wait for more at most.
const TOGETHER: usize = 64 << 10;

enum Style {
    Json,
    Bars(Bars),
    Lines,
}

impl ProgressReport {
    /// As JSON, or for people; quiet: only the paths; verbose: how each source is asked, too.
    #[must_use]
    pub fn new(json: bool, quiet: bool, verbose: bool) -> Self {
        let dumb = env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        let style = match json {
            true => Style::Json,
            false if !quiet && !dumb && io::stderr().is_terminal() => Style::Bars(Bars::new()),
            false => Style::Lines,
        };
        Self {
            style,
            quiet,
            verbose,
            last: None,
            so_far: None,
            waiting: String::new(),
        }
    }

    /// Shows an event. [`Event::Failed`] is only noted: [`failed`](Self::failed) shows it.
    ///
    /// # Errors
    /// If nobody reads standard output any more.
    pub fn event(&mut self, event: &Event) -> Result<()> {
        if !matches!(
            (&self.style, event),
            (Style::Json, _) | (_, Event::FileDone(_))
        ) {
            // Something else is about to be said to people.
            self.flush()?;
        }
        match event {
            Event::Progress(progress) => {
                if let Style::Bars(bars) = &mut self.style {
                    bars.show(progress);
                }
                if self.is_due() {
                    match self.style {
                        Style::Json => self.say(&serde_json::to_string(&Line::from(progress))?)?,
                        Style::Lines => {
                            self.note(&format!("{} %  {}", percent(progress), summary(progress)))
                        }
                        Style::Bars(_) => {}
                    }
                    let active = progress
                        .sources
                        .iter()
                        .filter(|source| self.verbose && source.state == "active");
                    active.for_each(|source| self.note(&format!("  {}", describe(source))));
                }
            }
            Event::Failed(failed) => self.so_far.clone_from(&failed.so_far),
            Event::FileDone(file) if !matches!(self.style, Style::Json) => {
                self.say(&escape(&file.path))?;
            }
            Event::FileFailed(file) if !matches!(self.style, Style::Json) => {
                self.note(&file.text);
            }
            Event::Note(told) if !matches!(self.style, Style::Json) => self.note(&told.text),
            Event::Done(done) if !matches!(self.style, Style::Json) => {
                self.clear();
                farewell(done, self.verbose)
                    .iter()
                    .for_each(|text| self.note(text));
            }
            other => {
                if let (Style::Json, Some(line)) = (&self.style, Line::of(other)) {
                    self.say(&serde_json::to_string(&line)?)?;
                }
            }
        }
        Ok(())
    }

    /// The last event of a download that failed; people read the error itself.
    ///
    /// # Errors
    /// If nobody reads standard output any more.
    pub fn failed(&mut self, exit_code: u8, message: &str) -> Result<()> {
        if matches!(self.style, Style::Json) {
            let so_far = self.so_far.as_ref().map(Summary::from);
            let line = serde_json::to_string(&Line::Failed {
                exit_code,
                message,
                so_far,
            })?;
            self.say(&line)?;
        }
        self.flush()
    }

    fn say(&mut self, line: &str) -> Result<()> {
        self.waiting.push_str(line);
        self.waiting.push('\n');
        if self.waiting.len() < TOGETHER {
            Ok(())
        } else {
            self.flush()
        }
    }

    /// Writes what is for standard output.
    ///
    /// # Errors
    /// If nobody reads it any more.
    pub fn flush(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        if waiting.is_empty() {
            Ok(())
        } else {
            self.aside(|| output::print(waiting.as_bytes()))
        }
    }

    /// Says something to people beside the bars.
    pub fn note(&self, text: &str) {
        if !self.quiet && !matches!(self.style, Style::Json) {
            self.aside(|| note(text));
        }
    }

    /// Takes the bars away.
    pub fn clear(&mut self) {
        if let Style::Bars(bars) = &mut self.style {
            bars.clear();
        }
    }

    fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.style {
            Style::Bars(bars) => bars.suspend(print),
            _ => print(),
        }
    }

    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let is_due = match (self.last, &self.style) {
            (Some(last), Style::Json) => now.duration_since(last) >= JSON_INTERVAL,
            (Some(last), _) => now.duration_since(last) >= LINE_INTERVAL,
            // A program sees every download progress once; people need not read that it has just begun.
            (None, style) => matches!(style, Style::Json),
        };
        if is_due || self.last.is_none() {
            self.last = Some(now);
        }
        is_due
    }
}

/// Whole percents, 100 only when all is there.
fn percent(progress: &Progress) -> u64 {
    match progress.bytes_total {
        0 => 100,
        total => u64::try_from(u128::from(progress.bytes_done) * 100 / u128::from(total))
            .unwrap_or(100)
            .min(100),
    }
}

/// `1.2 GiB of 3.0 GiB, 98.0 MiB/s, 18 s left, 1 of 12 files, 3 sources`
fn summary(progress: &Progress) -> String {
    let Progress {
        bytes_done,
        bytes_total,
        bytes_per_second,
        ..
    } = *progress;
    let mut parts = vec![format!(
        "{} of {}",
        human_size(bytes_done),
        human_size(bytes_total)
    )];
    if bytes_per_second > 0 {
        parts.push(format!("{}/s", human_size(bytes_per_second)));
        if bytes_total > bytes_done {
            parts.push(format!(
                "{} left",
                span((bytes_total - bytes_done).div_ceil(bytes_per_second))
            ));
        }
    }
    if progress.files_total > 1 {
        parts.push(format!(
            "{} of {} files",
            progress.files_done, progress.files_total
        ));
    }
    let n_active = progress
        .sources
        .iter()
        .filter(|source| source.state == "active")
        .count();
    parts.push(count(n_active as u64, "source"));
    parts.join(", ")
}

/// What was fetched from whom; verbose: and how it was asked in the end.
fn farewell(done: &Done, verbose: bool) -> Vec<String> {
    let seconds = done.duration_ms.max(1) as f64 / 1000.0;
    let (files, size) = (count(done.files, "file"), human_size(done.bytes_total));
    let mut first = format!("{files}, {size} in {seconds:.1} s");
    // Less says nothing about speed.
    if done.bytes_fetched >= 1 << 20 {
        let speed = u128::from(done.bytes_fetched) * 1000 / u128::from(done.duration_ms.max(1));
        first += &format!(
            ", {}/s",
            human_size(u64::try_from(speed).unwrap_or(u64::MAX))
        );
    }
    for (bytes, what) in [
        (done.bytes_resumed, "were here already"),
        (done.bytes_wasted, "came twice or did not verify"),
    ] {
        if bytes > 0 {
            first += &format!(", {} {what}", human_size(bytes));
        }
    }
    if done.files_skipped > 0 {
        first += &format!(", {} left alone", count(done.files_skipped, "file"));
    }
    let held_up = in_words(&done.bottleneck).map(|what| format!("  held up by {what}"));
    let sources = done.sources.iter().filter(|source| source.bytes > 0);
    let whom = |source| {
        if verbose {
            describe(source)
        } else {
            short(&source.peer_id)
        }
    };
    let lines =
        sources.map(|source| format!("  {:>10} from {}", human_size(source.bytes), whom(source)));
    [first].into_iter().chain(lines).chain(held_up).collect()
}

/// An event as JSON.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line<'a> {
    Started {
        bytes_total: u64,
        files_total: u64,
    },
    Progress {
        bytes_done: u64,
        bytes_total: u64,
        files_done: u64,
        files_total: u64,
        bytes_per_second: u64,
        sources: Vec<SourceLine<'a>>,
        files: Vec<FileLine<'a>>,
    },
    File {
        name: &'a str,
        content_id: &'a str,
        size: u64,
        path: &'a str,
        already_there: bool,
    },
    FileFailed {
        name: &'a str,
        content_id: &'a str,
        /// One word.
        reason: String,
        text: &'a str,
    },
    Note {
        text: &'a str,
        #[serde(skip_serializing_if = "str::is_empty")]
        peer: &'a str,
    },
    Done(Summary<'a>),
    Failed {
        exit_code: u8,
        message: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        so_far: Option<Summary<'a>>,
    },
}

#[derive(Serialize)]
pub(super) struct SourceLine<'a> {
    peer: &'a str,
    address: &'a str,
    state: &'a str,
    bytes: u64,
    bytes_per_second: u64,
    chunk_length: u32,
    claim_pieces: u32,
}

#[derive(Serialize)]
struct FileLine<'a> {
    name: &'a str,
    bytes_done: u64,
    bytes_total: u64,
}

#[derive(Serialize)]
struct Summary<'a> {
    bytes_total: u64,
    bytes_fetched: u64,
    bytes_resumed: u64,
    bytes_wasted: u64,
    files: u64,
    files_skipped: u64,
    files_failed: u64,
    duration_ms: u64,
    bottleneck: &'a str,
    sources: Vec<Share<'a>>,
}

#[derive(Serialize)]
struct Share<'a> {
    peer: &'a str,
    bytes: u64,
}

impl<'a> Line<'a> {
    fn of(event: &'a Event) -> Option<Self> {
        Some(match event {
            Event::Started(started) => Self::Started {
                bytes_total: started.bytes_total,
                files_total: started.files_total,
            },
            Event::Progress(progress) => progress.into(),
            Event::FileDone(file) => Self::File {
                name: &file.name,
                content_id: &file.content_id,
                size: file.size,
                path: &file.path,
                already_there: file.already_there,
            },
            Event::FileFailed(file) => Self::FileFailed {
                name: &file.name,
                content_id: &file.content_id,
                reason: file
                    .reason()
                    .as_str_name()
                    .trim_start_matches("REASON_")
                    .to_ascii_lowercase(),
                text: &file.text,
            },
            Event::Note(note) => Self::Note {
                text: &note.text,
                peer: &note.peer_id,
            },
            Event::Done(done) => Self::Done(done.into()),
            Event::Failed(_) => return None,
        })
    }
}

impl<'a> From<&'a SourceProgress> for SourceLine<'a> {
    fn from(source: &'a SourceProgress) -> Self {
        Self {
            peer: &source.peer_id,
            address: &source.address,
            state: &source.state,
            bytes: source.bytes,
            bytes_per_second: source.bytes_per_second,
            chunk_length: source.chunk_length,
            claim_pieces: source.claim_pieces,
        }
    }
}

impl<'a> From<&'a Progress> for Line<'a> {
    fn from(progress: &'a Progress) -> Self {
        let file = |file: &'a FileProgress| FileLine {
            name: &file.name,
            bytes_done: file.bytes_done,
            bytes_total: file.bytes_total,
        };
        Self::Progress {
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            files_done: progress.files_done,
            files_total: progress.files_total,
            bytes_per_second: progress.bytes_per_second,
            sources: progress.sources.iter().map(SourceLine::from).collect(),
            files: progress.files.iter().map(file).collect(),
        }
    }
}

impl<'a> From<&'a Done> for Summary<'a> {
    fn from(done: &'a Done) -> Self {
        let share = |source: &'a SourceProgress| Share {
            peer: &source.peer_id,
            bytes: source.bytes,
        };
        Self {
            bytes_total: done.bytes_total,
            bytes_fetched: done.bytes_fetched,
            bytes_resumed: done.bytes_resumed,
            bytes_wasted: done.bytes_wasted,
            files: done.files,
            files_skipped: done.files_skipped,
            files_failed: done.files_failed,
            duration_ms: done.duration_ms,
            bottleneck: &done.bottleneck,
            sources: done.sources.iter().map(share).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{FileDone, Note, Started};

    fn json(event: &Event) -> String {
        serde_json::to_string(&Line::of(event).unwrap()).unwrap()
    }

    fn source(bytes: u64, state: &str) -> SourceProgress {
        let (peer_id, state) = ("ab".repeat(26), state.into());
        SourceProgress {
            peer_id,
            bytes,
            state,
            ..Default::default()
        }
    }

    fn done() -> Done {
        Done {
            bytes_total: 3 << 20,
            bytes_fetched: 2 << 20,
            bytes_resumed: 1 << 20,
            files: 2,
            duration_ms: 500,
            sources: vec![source(2 << 20, "gone"), source(0, "banned")],
            bytes_wasted: 0,
            files_skipped: 1,
            files_failed: 0,
            bottleneck: "disk".into(),
        }
    }

    #[test]
    fn events_have_the_promised_shape() {
        assert_eq!(
            json(&Event::Started(Started {
                bytes_total: 7,
                files_total: 1
            })),
            r#"{"event":"started","bytes_total":7,"files_total":1}"#
        );
        let file = FileDone {
            name: "a".into(),
            content_id: "f0".into(),
            size: 7,
            path: "/a".into(),
            already_there: false,
        };
        assert_eq!(
            json(&Event::FileDone(file)),
            r#"{"event":"file","name":"a","content_id":"f0","size":7,"path":"/a","already_there":false}"#
        );
        let note = Note {
            text: "lost".into(),
            peer_id: String::new(),
        };
        assert_eq!(
            json(&Event::Note(note)),
            r#"{"event":"note","text":"lost"}"#
        );
        let value: serde_json::Value = serde_json::from_str(&json(&Event::Done(done()))).unwrap();
        assert_eq!(value["event"], "done");
        for key in [
            "bytes_total",
            "bytes_fetched",
            "bytes_resumed",
            "files",
            "duration_ms",
        ] {
            assert!(value[key].is_u64(), "{key}");
        }
        assert_eq!(
            value["sources"][0],
            serde_json::json!({ "peer": "ab".repeat(26), "bytes": 2 << 20 })
        );
        let failed = Line::Failed {
            exit_code: 4,
            message: "nobody",
            so_far: None,
        };
        assert_eq!(
            serde_json::to_string(&failed).unwrap(),
            r#"{"event":"failed","exit_code":4,"message":"nobody"}"#
        );
    }

    #[test]
    fn people_read_verified_bytes_speed_and_time_left() {
        let progress = Progress {
            bytes_done: 1 << 30,
            bytes_total: 3 << 30,
            files_done: 1,
            files_total: 12,
            bytes_per_second: 100 << 20,
            sources: vec![source(1, "active"), source(1, "active"), source(0, "gone")],
            files: vec![],
            bottleneck: String::new(),
        };
        assert_eq!(
            summary(&progress),
            "1.0 GiB of 3.0 GiB, 100.0 MiB/s, 21 s left, 1 of 12 files, 2 sources"
        );
        assert_eq!(
            (percent(&progress), percent(&Progress::default())),
            (33, 100)
        );
        assert_eq!(
            farewell(&done(), false),
            [
                "2 files, 3.0 MiB in 0.5 s, 4.0 MiB/s, 1.0 MiB were here already, 1 file left alone",
                "     2.0 MiB from abababab",
                "  held up by this disk",
            ]
        );
    }

    #[test]
    fn a_source_is_shown_with_its_current_sizes() {
        let source = SourceProgress {
            bytes_per_second: 98 << 20,
            chunk_length: 256 << 10,
            claim_pieces: 64,
            ..source(1, "active")
        };
        assert_eq!(
            describe(&source),
            "abababab at 98.0 MiB/s in chunks of 256.0 KiB and claims of 64 pieces"
        );
        let progress = Progress {
            sources: vec![source],
            ..Default::default()
        };
        let value = serde_json::to_value(Line::from(&progress)).unwrap();
        assert_eq!(
            (
                &value["sources"][0]["chunk_length"],
                &value["sources"][0]["claim_pieces"]
            ),
            (&262_144.into(), &64.into())
        );
    }

    #[test]
    fn progress_is_not_repeated_too_often() {
        for (json, interval) in [(true, JSON_INTERVAL), (false, LINE_INTERVAL)] {
            let mut report = ProgressReport::new(json, true, false);
            assert_eq!((report.is_due(), report.is_due()), (json, false));
            report.last = Instant::now().checked_sub(interval);
            assert!(report.is_due() && !report.is_due());
        }
    }
}

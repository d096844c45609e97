//! A download on a terminal.
//!
//! Invariant: nothing else is printed while the bars are there but through [`Bars::suspend`].

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{percent, summary};
use crate::{proto::Progress, safe_path::escape};

/// Files that have a bar of their own.
const FILE_BARS: usize = 4;

/// One bar for everything, and one for each of a few files in work; no colours.
pub(super) struct Bars {
    all: MultiProgress,
    total: ProgressBar,
    files: Vec<ProgressBar>,
}

impl Bars {
    pub(super) fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let total = all.add(bar("{bar:20} {wide_msg}"));
        Self {
            all,
            total,
            files: Vec::new(),
        }
    }

    pub(super) fn show(&mut self, progress: &Progress) {
        set(&self.total, progress.bytes_done, progress.bytes_total);
        self.total
            .set_message(format!("{} %  {}", percent(progress), summary(progress)));
        let files = if progress.files_total > 1 {
            &progress.files[..]
        } else {
            &[]
        };
        let n_bars = files.len().min(FILE_BARS);
        for gone in self.files.drain(n_bars.min(self.files.len())..) {
            gone.finish_and_clear();
            self.all.remove(&gone);
        }
        while self.files.len() < n_bars {
            self.files.push(self.all.add(bar("  {bar:18} {wide_msg}")));
        }
        for (bar, file) in self.files.iter().zip(files) {
            set(bar, file.bytes_done, file.bytes_total);
            bar.set_message(escape(&file.name));
        }
    }

    pub(super) fn clear(&mut self) {
        self.files.drain(..).for_each(|bar| bar.finish_and_clear());
        self.total.finish_and_clear();
    }

    /// Prints something beside the bars.
    pub(super) fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        self.all.suspend(print)
    }
}

fn bar(template: &str) -> ProgressBar {
    let style =
        ProgressStyle::with_template(template).expect("the templates are ours and well-formed");
    ProgressBar::no_length().with_style(style.progress_chars("=> "))
}

fn set(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total.max(1));
    bar.set_position(if total == 0 { 1 } else { done });
}

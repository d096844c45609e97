//! The log: one subscriber per process, set up once by `main`; how much it says can be changed while it runs.
//!
//! Invariant: log lines go to standard error only; standard output belongs to results.

use std::{
    io::{self, IsTerminal},
    sync::{Mutex, OnceLock},
};

use anyhow::{Context, Result, anyhow};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt, layer::SubscriberExt, registry, reload,
    util::SubscriberInitExt,
};

use crate::config::{LogConfig, LogLevel};

/// The log of this process.
struct Live {
    reload: reload::Handle<EnvFilter, Registry>,
    /// The level, or the directives, that hold now.
    level: Mutex<String>,
}

static LIVE: OnceLock<Live> = OnceLock::new();

/// Installs the subscriber for the whole process.
///
/// `directives` is the value of `SPRAT_LOG` (such as `sprat=debug,h2=info`) and replaces the configured level. Fails if
/// it cannot be parsed, or if a subscriber is already installed.
pub fn init(log: &LogConfig, directives: Option<&str>) -> Result<()> {
    let (filter, reload) = reload::Layer::new(filter(log, directives)?);
    // With colours they are only ever switched off: on a terminal the crate itself honours NO_COLOR.
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = if io::stderr().is_terminal() {
        lines
    } else {
        lines.with_ansi(false)
    };
    let lines = if log.json {
        lines.json().boxed()
    } else {
        lines.boxed()
    };
    registry().with(filter).with(lines).try_init()?;
    let level = directives
        .filter(|text| !text.trim().is_empty())
        .unwrap_or(log.level.as_str())
        .to_owned();
    let _ = LIVE.set(Live {
        reload,
        level: Mutex::new(level),
    });
    Ok(())
}

/// Changes how much is logged, unless `level` is empty, and says what holds then.
///
/// # Errors
/// An unknown level, or a process without a log.
pub fn level(level: &str) -> Result<String> {
    let live = LIVE.get().context("this process has no log")?;
    let mut now = live.level.lock().expect("no panic while the lock is held");
    if !level.is_empty() {
        let level = LogLevel::try_from(level.to_owned()).map_err(|error| anyhow!(error))?;
        live.reload
            .reload(filter(&LogConfig { level, json: false }, None)?)?;
        level.as_str().clone_into(&mut now);
        tracing::info!("the log level is {level:?} now", level = level.as_str());
    }
    Ok(now.clone())
}

fn filter(log: &LogConfig, directives: Option<&str>) -> Result<EnvFilter> {
    // Other crates speak only when something is wrong: their debug output would drown ours.
    let others = log.level.min(LogLevel::Warn);
    let own = format!("{},sprat={}", others.as_str(), log.level.as_str());
    let text = directives
        .filter(|text| !text.trim().is_empty())
        .unwrap_or(&own);
    EnvFilter::builder()
        .parse(text)
        .with_context(|| format!("SPRAT_LOG={text:?} is not a log filter"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(level: LogLevel, directives: Option<&str>) -> String {
        filter(&LogConfig { level, json: false }, directives)
            .unwrap()
            .to_string()
    }

    #[test]
    fn own_level_applies_to_our_lines_only() {
        assert_eq!(shown(LogLevel::Debug, None), "sprat=debug,warn");
        assert_eq!(shown(LogLevel::Error, None), "sprat=error,error");
        assert_eq!(shown(LogLevel::Off, Some("")), "sprat=off,off");
    }

    #[test]
    fn the_variable_replaces_the_level() {
        assert_eq!(shown(LogLevel::Error, Some("trace")), "trace");
        let error = filter(
            &LogConfig {
                level: LogLevel::Info,
                json: false,
            },
            Some("sprat=loud"),
        )
        .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("SPRAT_LOG=\"sprat=loud\" is not a log filter"),
            "{error}"
        );
    }
}

//! Parses, starts the log, runs one command or the menu, and ends with its exit code.

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use sprat::{
    cli::{self, Action, Args, Command, Session},
    demo, menu, telemetry,
};
use tokio::runtime::{Builder, Runtime};

/// For blocking work that nobody waits for any more.
const LEFTOVERS: Duration = Duration::from_secs(1);
/// glibc keeps freed memory up to twice the longest block it saw freed, instead of giving it back and faulting it in
/// anew for each piece: a quarter of what a transfer costs.
const KEEP_FREED: usize = 16 << 20;

fn main() -> ExitCode {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(KEEP_FREED)));
    cli::finish(run(&cli::parse()))
}

fn run(args: &Args) -> anyhow::Result<()> {
    let session = Session::load(args, menu::passphrase)?;
    telemetry::init(&session.config.log, session.log_filter.as_deref())?;
    let runtime = runtime(args).context("starting threads")?;
    let result = runtime.block_on(async {
        match args.wanted() {
            None => Box::pin(menu::run(session)).await,
            Some(Command::Demo(options)) => demo::run(options).await,
            Some(Command::Action(action)) => cli::run(&session, &action).await,
        }
    });
    runtime.shutdown_timeout(LEFTOVERS);
    result
}

/// Bytes are verified, read and written on other threads, and each of them costs two system calls if the threads that
/// drive connections have as many cores to hop between: with one of these on two cores a transfer took 13 % less CPU time
/// and 14 % less time. A tracker does nothing but drive connections.
fn runtime(args: &Args) -> std::io::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let is_tracker = matches!(args.wanted(), Some(Command::Action(Action::Tracker(_))));
    let drivers = if is_tracker { cores } else { cores.div_ceil(2) };
    Builder::new_multi_thread()
        .worker_threads(drivers)
        .enable_all()
        .build()
}

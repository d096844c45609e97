//! A slow or failing network between a source and the others: a relay that lets through so many bytes a second, and so
//! many in all. A download over it lasts long enough for a test to do something in the middle.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Runtime,
    time::{Instant, sleep_until},
};

/// A relay; it ends when dropped.
pub struct SlowLink {
    /// Where to connect.
    pub address: SocketAddr,
    line: Arc<Line>,
    _runtime: Runtime,
}

/// How a link ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Every connection is reset.
    Reset,
    /// Nothing comes back any more, and nobody says so.
    Silence,
}

/// What all connections share.
struct Line {
    bytes_per_second: AtomicU64,
    busy_until: Mutex<Instant>,
    /// Bytes that come back before the end.
    left: AtomicU64,
    end: End,
}

impl SlowLink {
    /// Relays to `port` of this machine; `bytes_per_second` come back over all connections together.
    pub fn to(port: u16, bytes_per_second: u64) -> Self {
        Self::ending(port, bytes_per_second, u64::MAX, End::Silence)
    }

    /// A link that ends when so many bytes have come back.
    pub fn ending(port: u16, bytes_per_second: u64, after: u64, end: End) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let bytes_per_second = AtomicU64::new(bytes_per_second);
        let line = Line {
            bytes_per_second,
            busy_until: Mutex::new(Instant::now()),
            left: AtomicU64::new(after),
            end,
        };
        let line = Arc::new(line);
        let shared = line.clone();
        runtime.spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let line = shared.clone();
                if line.end == End::Reset {
                    near.set_zero_linger().unwrap();
                }
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(("127.0.0.1", port)).await else {
                        return;
                    };
                    let ((near_in, near_out), (far_in, far_out)) =
                        (near.into_split(), far.into_split());
                    tokio::select! {
                        () = relay(near_in, far_out, None) => {}
                        () = relay(far_in, near_out, Some(line)) => {}
                    }
                });
            }
        });
        Self {
            address,
            line,
            _runtime: runtime,
        }
    }

    /// From now on so many bytes a second come back.
    pub fn set(&self, bytes_per_second: u64) {
        self.line
            .bytes_per_second
            .store(bytes_per_second, Ordering::Relaxed);
    }
}

async fn relay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, line: Option<Arc<Line>>) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(n @ 1..) = from.read(&mut buffer).await else {
            return;
        };
        if let Some(line) = &line {
            sleep_until(line.busy_until(n as u64)).await;
            if !line.carries(n as u64) {
                match line.end {
                    End::Reset => return,
                    End::Silence => std::future::pending().await,
                }
            }
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

impl Line {
    fn busy_until(&self, bytes: u64) -> Instant {
        let takes = bytes as f64 / self.bytes_per_second.load(Ordering::Relaxed) as f64;
        let mut until = self.busy_until.lock().unwrap();
        *until = (*until).max(Instant::now()) + Duration::from_secs_f64(takes);
        *until
    }

    /// False once too many bytes came back.
    fn carries(&self, bytes: u64) -> bool {
        let left = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(bytes))
            });
        left.unwrap() >= bytes
    }
}

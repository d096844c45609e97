//! A slow network between a source and the others: a relay that lets through so many bytes a second. A download over it
//! lasts long enough for a test to do something in the middle.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
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
    _runtime: Runtime,
}

impl SlowLink {
    /// Relays to `port` of this machine; `bytes_per_second` come back over all connections together.
    pub fn to(port: u16, bytes_per_second: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let clock = Arc::new(Mutex::new(Instant::now()));
        runtime.spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let clock = clock.clone();
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::select! {
                        () = relay(near_in, far_out, None) => {}
                        () = relay(far_in, near_out, Some((clock, bytes_per_second))) => {}
                    }
                });
            }
        });
        Self { address, _runtime: runtime }
    }
}

type Pace = (Arc<Mutex<Instant>>, u64);

async fn relay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, pace: Option<Pace>) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(n @ 1..) = from.read(&mut buffer).await else { return };
        if let Some((clock, bytes_per_second)) = &pace {
            let until = {
                let mut clock = clock.lock().unwrap();
                *clock = (*clock).max(Instant::now()) + Duration::from_secs_f64(n as f64 / *bytes_per_second as f64);
                *clock
            };
            sleep_until(until).await;
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

//! A way between two workers that can be cut, frozen and falsified.

use std::sync::Arc;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What happens to bytes on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// They pass.
    Open,
    /// They stay where they are; connections stay too. A stopped process or an unplugged cable looks like this.
    Frozen,
    /// Connections are closed, and new ones too.
    Cut,
}

/// Forwards connections to one address until dropped.
pub(crate) struct Proxy {
    pub(crate) address: String,
    way: Arc<watch::Sender<Way>>,
}

impl Proxy {
    /// Starts forwarding to `upstream`, `step` bytes at a time. With `flip`, one bit of each connection's byte of that number,
    /// source to target, is turned.
    pub(crate) async fn start(upstream: String, step: usize, flip: Option<usize>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("bound").to_string();
        let way = Arc::new(watch::Sender::new(Way::Open));
        let ways = way.subscribe();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&upstream).await else { continue };
                let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                tokio::spawn(forward(near_read, far_write, ways.clone(), step, flip));
                tokio::spawn(forward(far_read, near_write, ways.clone(), step, None));
            }
        });
        Self { address, way }
    }

    pub(crate) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
    step: usize,
    flip: Option<usize>,
) {
    let (mut passed, mut buffer) = (0, vec![0; step]);
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            cut = way.wait_for(|way| *way == Way::Cut) => cut.map_or(0, |_| 0),
        };
        let open = way.wait_for(|way| *way != Way::Frozen).await;
        if read == 0 || open.is_ok_and(|way| *way == Way::Cut) {
            return;
        }
        if let Some(at) = flip.filter(|at| (passed..passed + read).contains(at)) {
            buffer[at - passed] ^= 0x10;
        }
        passed += read;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

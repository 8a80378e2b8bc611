//! A TCP proxy that can be cut and slowed: the network between a process and etcd.

use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// What the proxy does to its connections.
#[derive(Clone, Copy, Debug)]
struct Weather {
    up: bool,
    /// Wait before each piece that goes to the server.
    delay: Duration,
}

/// A running proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Starts a proxy to `http://host:port`.
    pub(crate) async fn start(target: String) -> Self {
        let target = target.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let (weather, now) = watch::channel(Weather { up: true, delay: Duration::ZERO });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, target, now));
        Self { address, weather, _tasks: tasks }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Closes all connections and every new one.
    pub(crate) fn cut(&self) {
        self.weather.send_modify(|weather| weather.up = false);
    }

    /// Lets connections through again.
    pub(crate) fn mend(&self) {
        self.weather.send_modify(|weather| weather.up = true);
    }

    /// Makes each piece that goes to the server wait.
    pub(crate) fn delay(&self, delay: Duration) {
        self.weather.send_modify(|weather| weather.delay = delay);
    }
}

async fn accept(listener: TcpListener, target: String, weather: watch::Receiver<Weather>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let mut cut = weather.clone();
        let (target, weather) = (target.clone(), weather.clone());
        connections.spawn(async move {
            tokio::select! {
                _ = cut.wait_for(|weather| !weather.up) => {}
                _ = carry(client, &target, weather) => {}
            }
        });
    }
}

async fn carry(client: TcpStream, target: &str, weather: watch::Receiver<Weather>) -> std::io::Result<()> {
    let server = TcpStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async move {
        let mut piece = vec![0; 64 << 10];
        loop {
            let length = from_client.read(&mut piece).await?;
            if length == 0 {
                return Ok(());
            }
            let delay = weather.borrow().delay;
            tokio::time::sleep(delay).await;
            to_server.write_all(&piece[..length]).await?;
        }
    };
    let down = async move { copy(&mut from_server, &mut to_client).await.map(drop) };
    tokio::select! {
        ended = up => ended,
        ended = down => ended,
    }
}

//! The sockets of a link: clear text, or TLS where it is configured. Then nothing else is accepted.

use crate::{Error, TlsConfig, message::Greeting, tls::Tls};
use std::{
    io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write},
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// How this worker makes sockets.
#[derive(Debug)]
pub(crate) struct Sockets(Option<Tls>);

impl Sockets {
    /// Makes them as `config` says.
    pub(crate) fn new(config: Option<&TlsConfig>) -> Result<Self, Error> {
        config.map(Tls::load).transpose().map(Self)
    }

    /// Connects to `host:port`.
    pub(crate) async fn connect(&self, address: &str) -> io::Result<Socket> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("connect {address}: {error}"));
        let stream = TcpStream::connect(address).await.map_err(named)?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.0 else { return Ok(Socket::Clear(stream)) };
        let name = tls.name(address).map_err(|reason| named(io::Error::new(ErrorKind::InvalidData, reason)))?;
        let connected = TlsConnector::from(tls.current().client).connect(name, stream).await;
        let stream = connected.map_err(|error| match error.kind() {
            // What a worker without TLS does with a handshake.
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
                named(io::Error::new(ErrorKind::InvalidData, format!("TLS: {error}; has it [transfer.tls] too?")))
            }
            kind => named(io::Error::new(kind, format!("TLS: {error}"))),
        })?;
        Ok(Socket::Tls(Box::new(stream.into())))
    }

    /// Takes an accepted connection on. A peer that does not speak as this worker does is told so, as far as it will understand.
    pub(crate) async fn accept(&self, mut stream: TcpStream) -> io::Result<Socket> {
        stream.set_nodelay(true)?;
        let mut start = [0; 3];
        let peeked = stream.peek(&mut start).await?;
        match (&self.0, speaks_tls(&start[..peeked])) {
            (None, false) => Ok(Socket::Clear(stream)),
            (None, true) => Err(io::Error::other("it speaks TLS, and [transfer.tls] is not configured here")),
            (Some(_), false) => {
                let reason = "clear text: this worker speaks TLS only ([transfer.tls])".to_owned();
                let mut frame = Vec::new();
                Greeting::Reject { reason: reason.clone() }.encode(&mut frame);
                stream.write_all(&frame).await?;
                Err(io::Error::other(reason))
            }
            (Some(tls), true) => {
                let stream = TlsAcceptor::from(tls.current().server).accept(stream).await?;
                Ok(Socket::Tls(Box::new(stream.into())))
            }
        }
    }
}

/// Says whether a connection that starts so starts with a TLS handshake: record type 22, version 3.x (RFC 8446, 5.1). A greeting of
/// ours would have to be 64 KiB long to look the same, which none may be.
fn speaks_tls(start: &[u8]) -> bool {
    match start {
        [22, 3, minor, ..] => *minor != 0,
        [22] | [22, 3] => true,
        _ => false,
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) enum Socket {
    Clear(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Socket {
    /// Says whether both ends have the same address: then nothing of it leaves this machine, unless somebody else carries it on.
    pub(crate) fn is_looped(&self) -> bool {
        let stream = match self {
            Socket::Clear(stream) => stream,
            Socket::Tls(stream) => stream.get_ref().0,
        };
        let [ours, theirs] = [stream.local_addr(), stream.peer_addr()].map(|address| address.ok().map(|at| at.ip()));
        ours.is_some() && ours == theirs
    }

    /// Splits it into what is read and what is written. Dropping the latter tells the other end that nothing follows.
    pub(crate) fn into_split(self) -> (Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>) {
        match self {
            Socket::Clear(stream) => {
                let (reader, writer) = stream.into_split();
                (Box::new(reader), Box::new(writer))
            }
            Socket::Tls(stream) => {
                let (reader, writer) = tokio::io::split(stream);
                (Box::new(reader), Box::new(writer))
            }
        }
    }

    /// Takes it off this reactor, to be attached to a mover's.
    pub(crate) fn detach(self) -> io::Result<Detached> {
        match self {
            Socket::Clear(stream) => Ok(Detached { stream: stream.into_std()?, tls: None }),
            Socket::Tls(stream) => {
                let (stream, tls): (_, rustls::Connection) = match *stream {
                    TlsStream::Client(stream) => {
                        let (stream, tls) = stream.into_inner();
                        (stream, tls.into())
                    }
                    TlsStream::Server(stream) => {
                        let (stream, tls) = stream.into_inner();
                        (stream, tls.into())
                    }
                };
                Ok(Detached { stream: stream.into_std()?, tls: Some(Box::new(tls)) })
            }
        }
    }
}

/// A connection without a reactor.
#[derive(Debug)]
pub(crate) struct Detached {
    stream: std::net::TcpStream,
    tls: Option<Box<rustls::Connection>>,
}

impl Detached {
    /// Attaches it to the reactor that this runs on.
    pub(crate) fn attach(self) -> io::Result<Data> {
        Ok(Data { stream: TcpStream::from_std(self.stream)?, tls: self.tls })
    }
}

/// A data connection: bytes go straight from and into pages, or through TLS, which copies them once more.
#[derive(Debug)]
pub(crate) struct Data {
    stream: TcpStream,
    tls: Option<Box<rustls::Connection>>,
}

impl Data {
    /// Writes all of `slices`.
    pub(crate) async fn write_all(&mut self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        IoSlice::advance_slices(&mut slices, 0); // Drops empty ones in front: an empty write would read as a closed connection.
        while !slices.is_empty() {
            let written = match &mut self.tls {
                None => unless_blocked(self.stream.try_write_vectored(slices))?,
                Some(tls) => {
                    // As much as its buffer takes, 64 KiB; it must have left before there is room for more.
                    let written = tls.writer().write_vectored(slices)?;
                    flush(&self.stream, tls).await?;
                    Some(written)
                }
            };
            match written {
                Some(0) => return Err(ErrorKind::WriteZero.into()),
                Some(bytes) => IoSlice::advance_slices(&mut slices, bytes),
                None => self.stream.writable().await?,
            }
        }
        Ok(())
    }

    /// Reads what is there; nothing when there is nothing yet. Never waits.
    pub(crate) fn try_read(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
        let read = match &mut self.tls {
            None => unless_blocked(self.stream.try_read_vectored(slices))?,
            Some(tls) => loop {
                match unless_blocked(tls.reader().read_vectored(slices))? {
                    Some(bytes) => break Some(bytes),
                    // Closed by the peer without saying so: the reader reports it.
                    None => match unless_blocked(tls.read_tls(&mut Direct(&self.stream)))? {
                        Some(_) => _ = tls.process_new_packets().map_err(io::Error::other)?,
                        None => break None,
                    },
                }
            },
        };
        if read == Some(0) { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(read) }
    }

    /// Waits until there may be something to read.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.stream.readable().await
    }

    /// Fills `buffer`.
    pub(crate) async fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut read = 0;
        while read < buffer.len() {
            match self.try_read(&mut [IoSliceMut::new(&mut buffer[read..])])? {
                Some(bytes) => read += bytes,
                None => self.readable().await?,
            }
        }
        Ok(())
    }
}

#[cfg(any(fuzzing, test))]
impl From<TcpStream> for Data {
    fn from(stream: TcpStream) -> Self {
        Self { stream, tls: None }
    }
}

/// Sends what TLS has buffered.
async fn flush(stream: &TcpStream, tls: &mut rustls::Connection) -> io::Result<()> {
    while tls.wants_write() {
        if unless_blocked(tls.write_tls(&mut Direct(stream)))?.is_none() {
            stream.writable().await?;
        }
    }
    Ok(())
}

fn unless_blocked(done: io::Result<usize>) -> io::Result<Option<usize>> {
    match done {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// A socket's calls that do not wait, as TLS wants them.
struct Direct<'a>(&'a TcpStream);

impl Read for Direct<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Direct<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.try_write(buffer)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Clear(stream) => Pin::new(stream).poll_read(context, buffer),
            Socket::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Clear(stream) => Pin::new(stream).poll_write(context, bytes),
            Socket::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Clear(stream) => Pin::new(stream).poll_flush(context),
            Socket::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Clear(stream) => Pin::new(stream).poll_shutdown(context),
            Socket::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn neither_end_waits_for_acknowledgements() {
        let sockets = Sockets::new(None).expect("clear text needs no files");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound").to_string();
        let (dialled, accepted) = tokio::join!(sockets.connect(&address), listener.accept());
        let mut dialled = dialled.expect("somebody listens");
        dialled.write_all(b"who?").await.expect("it is open");
        let accepted = sockets.accept(accepted.expect("somebody dials").0).await.expect("clear text");
        for socket in [dialled, accepted] {
            let Socket::Clear(stream) = socket else { panic!("nobody spoke of TLS") };
            assert!(stream.nodelay().expect("it is a TCP socket"));
        }
    }

    #[test]
    fn tls_is_told_from_a_greeting() {
        for start in [&[22, 3, 1][..], &[22, 3, 3], &[22, 3], &[22]] {
            assert!(speaks_tls(start), "{start:?}");
        }
        // A greeting of 790 bytes starts so, and one of any other length otherwise.
        for start in [&[22, 3, 0][..], &[22, 4, 0], &[12, 0, 0], b"GET", &[]] {
            assert!(!speaks_tls(start), "{start:?}");
        }
    }
}

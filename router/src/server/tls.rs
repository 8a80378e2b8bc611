//! TLS towards clients: a certificate and its key from files, by rustls on ring.
//!
//! Files are looked at with each new connection and read again when they have changed. What cannot be read then leaves the last good
//! certificate in force; connections that are up stay up.

use anyhow::Context;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Where certificate and key are, in PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificate, and what signed it up to but without the root.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The certificate, kept up to date.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsFiles,
    loaded: Mutex<(Stamps, Arc<ServerConfig>)>,
}

/// When each file was changed, and its length.
type Stamps = [Option<(SystemTime, u64)>; 2];

impl Tls {
    /// Reads the files. Errors name the one at fault.
    pub(crate) fn load(files: &TlsFiles) -> anyhow::Result<Self> {
        let stamps = stamps(files);
        Ok(Self { loaded: Mutex::new((stamps, read(files)?)), files: files.clone() })
    }

    /// Does the server's part of the handshake.
    pub(super) async fn accept(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        TlsAcceptor::from(self.current()).accept(socket).await
    }

    fn current(&self) -> Arc<ServerConfig> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&self.files);
        if stamps != loaded.0 {
            // Remembered either way, so that each change is tried, and complained of, once.
            loaded.0 = stamps;
            match read(&self.files) {
                Ok(config) => {
                    tracing::info!(cert = %self.files.cert.display(), "certificate read again");
                    loaded.1 = config;
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "the certificate of before stays in force");
                }
            }
        }
        loaded.1.clone()
    }
}

fn stamps(files: &TlsFiles) -> Stamps {
    [&files.cert, &files.key].map(|file| {
        let metadata = fs::metadata(file).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    })
}

fn read(files: &TlsFiles) -> anyhow::Result<Arc<ServerConfig>> {
    let TlsFiles { cert, key } = files;
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.with_context(|| format!("read certificates in PEM from {}", cert.display()))?;
    anyhow::ensure!(!chain.is_empty(), "{} holds no certificate in PEM", cert.display());
    let private = PrivateKeyDer::from_pem_file(key);
    let private = private.with_context(|| format!("read a private key in PEM from {}", key.display()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .with_context(|| format!("use {} with {}", cert.display(), key.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

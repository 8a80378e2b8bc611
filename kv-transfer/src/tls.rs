//! TLS of a worker's links: certificates from files, both ends shown and checked.
//!
//! TLS 1.3 only, by rustls on ring. The dialling end checks the certificate of the dialled one as any client does: it is signed by
//! the cluster's authority and made out to the host that was dialled, or to `name` where certificates are not made out to hosts.
//! The dialled end checks that the other's is signed by the same authority; who it is, it says in `Hello`. So the authority is what
//! makes a member: use one that signs for this cluster alone.
//!
//! Files are looked at again with each new connection and read again when they have changed. What cannot be read then leaves the
//! last good certificates in force. Links that are up stay up. Sessions are not resumed: each connection is checked in full.

use crate::{Error, TlsConfig};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

/// Certificates, kept up to date.
#[derive(Debug)]
pub(crate) struct Tls {
    config: TlsConfig,
    loaded: Mutex<(Stamps, Ends)>,
}

/// What both roles of a connection need.
#[derive(Clone, Debug)]
pub(crate) struct Ends {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

/// When each file was changed, and its length.
type Stamps = [Option<(SystemTime, u64)>; 3];

impl Tls {
    /// Reads the files that `config` names.
    pub(crate) fn load(config: &TlsConfig) -> Result<Self, Error> {
        let stamps = stamps(config);
        Ok(Self { loaded: Mutex::new((stamps, read(config)?)), config: config.clone() })
    }

    /// Returns the certificates of now.
    pub(crate) fn current(&self) -> Ends {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&self.config);
        if stamps != loaded.0 {
            // Remembered either way, so that each change is tried, and complained of, once.
            loaded.0 = stamps;
            match read(&self.config) {
                Ok(ends) => {
                    tracing::info!(cert = %self.config.cert.display(), "certificates of links read again");
                    loaded.1 = ends;
                }
                Err(error) => tracing::warn!(%error, "the certificates of before stay in force"),
            }
        }
        loaded.1.clone()
    }

    /// Returns the name that the certificate of the worker at `address` must be made out to.
    pub(crate) fn name(&self, address: &str) -> Result<ServerName<'static>, String> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = self.config.name.as_deref().unwrap_or(host.trim_start_matches('[').trim_end_matches(']'));
        ServerName::try_from(host.to_owned()).map_err(|_| format!("{host:?} is no name that a certificate can have"))
    }
}

fn stamps(config: &TlsConfig) -> Stamps {
    [&config.ca, &config.cert, &config.key].map(|file| {
        let metadata = fs::metadata(file).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    })
}

fn read(config: &TlsConfig) -> Result<Ends, Error> {
    let wrong = |field: &'static str, file: &Path, reason: String| Error::Tls { field, file: file.to_owned(), reason };
    let in_ca = |reason| wrong("ca", &config.ca, reason);
    let in_cert = |reason| wrong("cert", &config.cert, reason);
    let in_key = |reason| wrong("key", &config.key, reason);

    let mut roots = RootCertStore::empty();
    for root in certificates(&config.ca).map_err(in_ca)? {
        roots.add(root).map_err(|error| in_ca(error.to_string()))?;
    }
    let roots = Arc::new(roots);
    let chain = certificates(&config.cert).map_err(in_cert)?;
    let key =
        || PrivateKeyDer::from_pem_file(&config.key).map_err(|error| in_key(format!("no private key in PEM: {error}")));

    let provider = Arc::new(ring::default_provider());
    let refused = |error: rustls::Error| match error {
        rustls::Error::InconsistentKeys(_) => in_key(format!("is not the key of {}", config.cert.display())),
        error => in_cert(error.to_string()),
    };
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|error| in_ca(error.to_string()))?;
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain.clone(), key()?)
        .map_err(refused)?;
    client.resumption = Resumption::disabled();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(refused)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key()?)
        .map_err(refused)?;
    server.send_tls13_tickets = 0;
    Ok(Ends { client: Arc::new(client), server: Arc::new(server) })
}

/// Reads one certificate or more, in PEM.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(file).map_err(|error| error.to_string())?;
    let certificates = read.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    if certificates.is_empty() { Err("no certificate in PEM".into()) } else { Ok(certificates) }
}

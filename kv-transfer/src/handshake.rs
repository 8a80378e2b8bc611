//! Whether two workers can exchange pages, and how: pure.
//!
//! The source says `Hello`, the target answers `Welcome` with its choice or `Reject` with both values. Nothing that could go
//! wrong at token 500 for want of a check here is left to be found then.

use crate::{
    Config, Identity, Peer, TransportKind, Verify,
    message::{Hello, PROTOCOL, Welcome},
};

/// Every transport, most wanted first.
const TRANSPORTS: [TransportKind; 2] = [TransportKind::Memory, TransportKind::Tcp];

/// What this worker brings to a handshake.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) identity: Identity,
    /// Number of this process.
    pub(crate) process: u64,
    /// Transports it accepts, most wanted first.
    transports: Vec<TransportKind>,
    /// Transports over which it wants contents digested.
    digest: Vec<TransportKind>,
    /// How often it pings, in milliseconds.
    pub(crate) ping_ms: u64,
}

impl Offer {
    /// Offers what `config` allows.
    pub(crate) fn new(config: &Config, identity: Identity, process: u64) -> Self {
        let transports = config.require.map_or(TRANSPORTS.to_vec(), |only| vec![only]);
        let digest = match config.verify {
            Verify::Auto => vec![TransportKind::Tcp],
            Verify::Full => TRANSPORTS.to_vec(),
            Verify::Counts => Vec::new(),
        };
        Self { identity, process, transports, digest, ping_ms: config.ping_interval_ms.max(1) }
    }

    /// Source: what to say first to `peer`.
    pub(crate) fn hello(&self, peer: &Peer) -> Hello {
        Hello {
            identity: self.identity.clone(),
            target: peer.worker.clone(),
            target_incarnation: peer.incarnation,
            process: self.process,
            transports: self.transports.clone(),
            digest: self.digest.clone(),
            ping_ms: self.ping_ms,
        }
    }

    /// Target: chooses the transport and whether contents are digested (when either end wants it), or says why not. The reason
    /// is worded for the source.
    pub(crate) fn answer(&self, hello: &Hello) -> Result<(TransportKind, bool), String> {
        let ours = &self.identity;
        if hello.target != ours.worker {
            return Err(format!("worker: you want `{}`, this is `{}`", hello.target, ours.worker));
        }
        past_life(hello.target_incarnation, ours.incarnation)?;
        same_pages(&hello.identity, ours)?;
        let shared_process = hello.process == self.process;
        let possible = |kind: &&TransportKind| **kind != TransportKind::Memory || shared_process;
        let offered = |kind: &&TransportKind| hello.transports.contains(kind);
        let Some(kind) = self.transports.iter().find(|kind| possible(kind) && offered(kind)) else {
            let process = if shared_process { "the same process" } else { "different processes" };
            let (theirs, ours) = (&hello.transports, &self.transports);
            return Err(format!("transport: yours {theirs:?}, ours {ours:?}, in {process}"));
        };
        Ok((*kind, self.digest.contains(kind) || hello.digest.contains(kind)))
    }

    /// Source: checks what the target answered to our `Hello` for `peer`, or says why the link cannot be.
    pub(crate) fn check(&self, welcome: &Welcome, peer: &Peer) -> Result<(), String> {
        if welcome.identity.worker != peer.worker {
            return Err(format!("worker: `{}` answered for `{}`", welcome.identity.worker, peer.worker));
        }
        past_life(peer.incarnation, welcome.identity.incarnation)?;
        same_pages(&self.identity, &welcome.identity)?;
        if !self.transports.contains(&welcome.transport) {
            return Err(format!("transport: ours {:?}, theirs {:?}", self.transports, welcome.transport));
        }
        Ok(())
    }
}

/// Refuses a peer that was told of a life of this worker that is over. A newer one than our own is this same process,
/// registered again after its lease was lost.
pub(crate) fn past_life(named: u64, own: u64) -> Result<(), String> {
    if named < own { Err(format!("incarnation: {named} is a past life, now it is {own}")) } else { Ok(()) }
}

/// The reason for another protocol version, as the target words it.
pub(crate) fn foreign(theirs: u32) -> String {
    format!("protocol: yours {theirs}, ours {PROTOCOL}")
}

fn same_pages(source: &Identity, target: &Identity) -> Result<(), String> {
    if source.fingerprint != target.fingerprint {
        return Err(format!("fingerprint: yours `{}`, ours `{}`", source.fingerprint, target.fingerprint));
    }
    match source.layout.mismatch(&target.layout) {
        Some(problem) => Err(format!("page layout: {}", problem.replace("ours", "yours").replace("theirs", "ours"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::identity;
    use kv_cache::KvDtype;

    fn offer(worker: &str, change: impl FnOnce(&mut Config, &mut Identity)) -> Offer {
        let (mut config, mut identity) = (Config::default(), identity(worker, 4));
        change(&mut config, &mut identity);
        Offer::new(&config, identity, 1)
    }

    fn peer(incarnation: u64) -> Peer {
        Peer { worker: "decode".into(), incarnation, link: "127.0.0.1:1".into() }
    }

    fn answer(source: &Offer, target: &Offer) -> Result<(TransportKind, bool), String> {
        target.answer(&source.hello(&peer(target.identity.incarnation)))
    }

    fn same(_: &mut Config, _: &mut Identity) {}

    #[test]
    fn mismatches_are_refused_with_both_values() {
        let source = offer("prefill", same);
        let check = |target: Offer, expected: &str| {
            assert_eq!(answer(&source, &target).expect_err(expected), expected);
        };
        check(
            offer("decode", |_, identity| identity.fingerprint = "other".into()),
            "fingerprint: yours `weights`, ours `other`",
        );
        check(
            offer("decode", |_, identity| identity.layout.dtype = KvDtype::F32),
            "page layout: dtype: yours bf16, ours f32",
        );
        check(offer("decode", |_, identity| identity.layout.layers = 9), "page layout: layers: yours 3, ours 9");
        check(offer("someone", same), "worker: you want `decode`, this is `someone`");
        assert_eq!(foreign(7), "protocol: yours 7, ours 1");
    }

    #[test]
    fn pools_may_differ_in_size() {
        let target = offer("decode", |_, identity| identity.layout.pages = 99);
        assert_eq!(answer(&offer("prefill", same), &target), Ok((TransportKind::Memory, false)));
    }

    #[test]
    fn a_past_life_is_refused_and_a_later_registration_is_not() {
        let (source, target) = (offer("prefill", same), offer("decode", same));
        let own = target.identity.incarnation;
        let refusal = target.answer(&source.hello(&peer(own - 1))).expect_err("older");
        assert_eq!(refusal, format!("incarnation: {} is a past life, now it is {own}", own - 1));
        assert!(target.answer(&source.hello(&peer(own + 1))).is_ok());
    }

    #[test]
    fn the_transport_is_what_both_can_do() {
        use TransportKind::{Memory, Tcp};
        let plain = offer("decode", same);
        let with = |change: fn(&mut Config)| offer("decode", |config, _| change(config));
        let elsewhere = |mut offer: Offer| {
            offer.process = 2;
            offer
        };
        let source = offer("prefill", same);
        assert_eq!(answer(&source, &plain), Ok((Memory, false)));
        assert_eq!(answer(&source, &elsewhere(plain.clone())), Ok((Tcp, true)));
        assert_eq!(answer(&source, &with(|config| config.require = Some(Tcp))), Ok((Tcp, true)));
        assert_eq!(answer(&source, &with(|config| config.verify = Verify::Full)), Ok((Memory, true)));
        let counts = |config: &mut Config| config.verify = Verify::Counts;
        assert_eq!(answer(&source, &elsewhere(with(counts))), Ok((Tcp, true)), "the source wants digests");
        let refusal = answer(&source, &elsewhere(with(|config| config.require = Some(Memory)))).expect_err("cannot");
        assert_eq!(refusal, "transport: yours [Memory, Tcp], ours [Memory], in different processes");
        let memory_only = offer("prefill", |config, _| config.require = Some(Memory));
        let refusal = answer(&memory_only, &with(|config| config.require = Some(Tcp))).expect_err("nothing in common");
        assert_eq!(refusal, "transport: yours [Memory], ours [Tcp], in the same process");
    }

    #[test]
    fn the_source_checks_the_answer_too() {
        let source = offer("prefill", |config, _| config.require = Some(TransportKind::Tcp));
        let welcome = |worker: &str, transport| Welcome {
            identity: identity(worker, 4),
            landings: 0,
            transport,
            digest: false,
            token: 0,
            ping_ms: 400,
        };
        let peer = peer(identity("decode", 4).incarnation);
        assert_eq!(source.check(&welcome("decode", TransportKind::Tcp), &peer), Ok(()));
        let downgrade = source.check(&welcome("decode", TransportKind::Memory), &peer).expect_err("not asked for");
        assert_eq!(downgrade, "transport: ours [Tcp], theirs Memory");
        let other = source.check(&welcome("prefill-7", TransportKind::Tcp), &peer).expect_err("not the one");
        assert_eq!(other, "worker: `prefill-7` answered for `decode`");
    }
}

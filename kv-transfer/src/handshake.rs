//! Whether two workers can exchange pages, and how: pure.
//!
//! The source says `Hello`, the target answers `Welcome` with its choice or `Reject` with both values. Nothing that could go
//! wrong at token 500 for want of a check here is left to be found then.

use crate::{
    Config, Identity, Peer, TransportKind, Verify,
    auth::Nonce,
    message::{Hello, Invitation, PROTOCOL, Welcome},
    plan::Terms,
};

/// Every transport, most wanted first.
const TRANSPORTS: [TransportKind; 5] =
    [TransportKind::Memory, TransportKind::Cuda, TransportKind::Shm, TransportKind::Ucx, TransportKind::Tcp];

/// What this worker brings to a handshake.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) identity: Identity,
    /// Number of this process.
    pub(crate) process: u64,
    /// The host whose processes can share this worker's pool, or why none can.
    shares: Result<String, String>,
    /// Transports it accepts, most wanted first.
    transports: Vec<TransportKind>,
    /// When it wants contents digested.
    verify: Verify,
    /// Whether pages may be rounded on their way here.
    lossy: bool,
    /// How often it pings, in milliseconds.
    pub(crate) ping_ms: u64,
}

/// What a target agrees to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Agreed {
    /// How bytes move.
    pub(crate) transport: TransportKind,
    /// Whether contents are digested.
    pub(crate) digest: bool,
    /// How pages of the source become pages of the target.
    pub(crate) terms: Terms,
}

impl Offer {
    /// Offers what `config` allows. `on_card`: pages are on cards. `with_ucx`: UCX is worth while, and not only to be used where it is required.
    pub(crate) fn new(
        config: &Config,
        identity: Identity,
        process: u64,
        shares: Result<String, String>,
        (on_card, with_ucx): (bool, bool),
    ) -> Self {
        let offered = |kind: &TransportKind| match (config.require, kind) {
            (Some(only), kind) => *kind == only,
            (None, TransportKind::Cuda) => on_card,
            (None, TransportKind::Ucx) => with_ucx,
            (None, _) => true,
        };
        let transports = TRANSPORTS.into_iter().filter(offered).collect();
        let verify = match config.verify {
            // TLS has authenticated what arrives.
            Verify::Auto if config.tls.is_some() => Verify::Counts,
            verify => verify,
        };
        let (lossy, ping_ms) = (config.lossy_kv, config.ping_interval_ms.max(1));
        Self { identity, process, shares, transports, verify, lossy, ping_ms }
    }

    /// The same without `kind`, unless that leaves nothing.
    pub(crate) fn without(&self, kind: TransportKind) -> Option<Self> {
        let transports: Vec<_> = self.transports.iter().copied().filter(|one| *one != kind).collect();
        (!transports.is_empty()).then(|| Self { transports, ..self.clone() })
    }

    /// Says whether links may use `kind`.
    pub(crate) fn allows(&self, kind: TransportKind) -> bool {
        self.transports.contains(&kind)
    }

    /// Source: what to say first to `peer`: with a number drawn for this link, whether there is a cluster token, and where the
    /// target can pass its pool.
    pub(crate) fn hello(&self, peer: &Peer, (nonce, cluster_token): (Nonce, bool), shm: Option<Invitation>) -> Hello {
        Hello {
            nonce,
            cluster_token,
            identity: self.identity.clone(),
            target: peer.worker.clone(),
            target_incarnation: peer.incarnation,
            process: self.process,
            shm,
            transports: self.transports.clone(),
            host: self.shares.clone().ok(),
            verify: self.verify,
            ping_ms: self.ping_ms,
        }
    }

    /// Target: chooses the transport and whether contents are digested (when either end wants it), or says why not. The reason
    /// is worded for the source. `looped`: both ends of the connection have one address. `failed`: what was chosen before and then
    /// did not work, and why.
    pub(crate) fn answer(
        &self,
        hello: &Hello,
        looped: bool,
        failed: &[(TransportKind, String)],
    ) -> Result<Agreed, String> {
        let ours = &self.identity;
        if hello.target != ours.worker {
            return Err(format!("worker: you want `{}`, this is `{}`", hello.target, ours.worker));
        }
        past_life(hello.target_incarnation, ours.incarnation)?;
        let terms = terms(&hello.identity, ours, self.lossy)?;
        let shared_process = hello.process == self.process;
        let mut problems = String::new();
        for kind in self.transports.iter().filter(|kind| hello.transports.contains(kind)) {
            let problem = match (failed.iter().find(|(failed, _)| failed == kind), kind) {
                (Some((_, problem)), _) => Some(problem.clone()),
                (None, TransportKind::Memory) if shared_process => None,
                (None, TransportKind::Memory) => continue, // The message says so anyway.
                (None, TransportKind::Cuda) if terms.converts() => Some("elements are converted on the way".into()),
                (None, TransportKind::Cuda) if [self.verify, hello.verify].contains(&Verify::Full) => {
                    Some("contents are digested, by the host".into())
                }
                (None, TransportKind::Cuda | TransportKind::Shm) => self.apart(hello.shm.as_ref()).err(),
                (None, TransportKind::Ucx | TransportKind::Tcp) => None,
            };
            match problem {
                Some(problem) => problems += &format!("; {kind:?}: {problem}"),
                None => {
                    // Between processes of one kernel a connection is memory: neither it nor TCP's checksum looks at the bytes.
                    let wired = !looped || hello.host.is_none() || hello.host.as_ref() != self.shares.as_ref().ok();
                    let digest = [self.verify, hello.verify].into_iter().any(|verify| match verify {
                        Verify::Auto => *kind == TransportKind::Tcp && wired,
                        Verify::Full => true,
                        Verify::Counts => false,
                    });
                    return Ok(Agreed { transport: *kind, digest, terms });
                }
            }
        }
        let process = if shared_process { "the same process" } else { "different processes" };
        let (theirs, ours) = (&hello.transports, &self.transports);
        Err(format!("transport: yours {theirs:?}, ours {ours:?}, in {process}{problems}"))
    }

    /// Says why the source, which invites so, cannot share our pool.
    fn apart(&self, invitation: Option<&Invitation>) -> Result<(), String> {
        let ours = self.shares.as_ref()?;
        match invitation {
            None => Err("you do not share memory".to_owned()),
            Some(invitation) if invitation.host == *ours => Ok(()),
            Some(invitation) => Err(format!("host: yours {}, ours {ours}", invitation.host)),
        }
    }

    /// Source: checks what the target answered to our `Hello` for `peer` and returns the terms, or says why the link cannot be.
    pub(crate) fn check(&self, welcome: &Welcome, peer: &Peer) -> Result<Terms, String> {
        if welcome.identity.worker != peer.worker {
            return Err(format!("worker: `{}` answered for `{}`", welcome.identity.worker, peer.worker));
        }
        past_life(peer.incarnation, welcome.identity.incarnation)?;
        // What may be lost is for the target to say, and it has answered.
        let terms = terms(&self.identity, &welcome.identity, true)?;
        if !self.transports.contains(&welcome.transport) {
            return Err(format!("transport: ours {:?}, theirs {:?}", self.transports, welcome.transport));
        }
        Ok(terms)
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

fn terms(source: &Identity, target: &Identity, lossy: bool) -> Result<Terms, String> {
    if source.fingerprint != target.fingerprint {
        return Err(format!("fingerprint: yours `{}`, ours `{}`", source.fingerprint, target.fingerprint));
    }
    Terms::agree(source, target, lossy).map_err(|problem| format!("page layout: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TlsConfig, auth::Proof, testing::identity};
    use kv_cache::KvDtype;

    fn offer(worker: &str, change: impl FnOnce(&mut Config, &mut Identity)) -> Offer {
        let (mut config, mut identity) = (Config::default(), identity(worker, 4));
        change(&mut config, &mut identity);
        Offer::new(&config, identity, 1, Ok("here".into()), (false, false))
    }

    fn peer(incarnation: u64) -> Peer {
        Peer { worker: "decode".into(), incarnation, link: "127.0.0.1:1".into() }
    }

    fn answer(source: &Offer, target: &Offer) -> Result<(TransportKind, bool), String> {
        let agreed = target.answer(&hello(source, target), false, &[])?;
        Ok((agreed.transport, agreed.digest))
    }

    fn hello(source: &Offer, target: &Offer) -> Hello {
        let invitation = source.shares.clone().ok().map(|host| Invitation { host, socket: "door".into() });
        source.hello(&peer(target.identity.incarnation), ([0; 32], false), invitation)
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
            offer("decode", |_, identity| identity.layout.dtype = KvDtype::Int8),
            "page layout: dtype: yours bf16, ours int8, and lossy_kv is off",
        );
        check(offer("decode", |_, identity| identity.layout.layers = 9), "page layout: layers: yours 3, ours 9");
        check(offer("someone", same), "worker: you want `decode`, this is `someone`");
        assert_eq!(foreign(7), "protocol: yours 7, ours 6");
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
        let hello = |incarnation| source.hello(&peer(incarnation), ([0; 32], false), None);
        let refusal = target.answer(&hello(own - 1), false, &[]).expect_err("older");
        assert_eq!(refusal, format!("incarnation: {} is a past life, now it is {own}", own - 1));
        assert!(target.answer(&hello(own + 1), false, &[]).is_ok());
    }

    #[test]
    fn the_transport_is_what_both_can_do() {
        use TransportKind::{Memory, Shm, Tcp};
        let plain = offer("decode", same);
        let with = |change: fn(&mut Config)| offer("decode", |config, _| change(config));
        let apart = |mut offer: Offer| {
            offer.process = 2;
            offer
        };
        let elsewhere = |offer: Offer| Offer { shares: Ok("there".into()), ..apart(offer) };
        let source = offer("prefill", same);
        assert_eq!(answer(&source, &plain), Ok((Memory, false)));
        assert_eq!(answer(&source, &apart(plain.clone())), Ok((Shm, false)));
        assert_eq!(answer(&source, &elsewhere(plain.clone())), Ok((Tcp, true)));
        assert_eq!(answer(&source, &with(|config| config.require = Some(Tcp))), Ok((Tcp, true)));
        let tls = |config: &mut Config, _: &mut Identity| {
            let file = std::path::PathBuf::from("worker.pem");
            config.tls = Some(TlsConfig { ca: file.clone(), cert: file.clone(), key: file, name: None });
        };
        assert_eq!(answer(&offer("prefill", tls), &elsewhere(offer("decode", tls))), Ok((Tcp, false)), "TLS digests");
        assert_eq!(answer(&source, &with(|config| config.verify = Verify::Full)), Ok((Memory, true)));
        let counts = |config: &mut Config| config.verify = Verify::Counts;
        assert_eq!(answer(&source, &elsewhere(with(counts))), Ok((Tcp, true)), "the source wants digests");
        let refusal = answer(&source, &elsewhere(with(|config| config.require = Some(Memory)))).expect_err("cannot");
        assert_eq!(refusal, "transport: yours [Memory, Shm, Tcp], ours [Memory], in different processes");
        let shm = with(|config| config.require = Some(Shm));
        assert_eq!(answer(&source, &shm), Ok((Shm, false)), "asked for, within one process too");
        let refusal = answer(&source, &elsewhere(shm.clone())).expect_err("another host");
        assert_eq!(
            refusal,
            "transport: yours [Memory, Shm, Tcp], ours [Shm], in different processes; Shm: host: yours here, ours there"
        );
        let memory_only = offer("prefill", |config, _| config.require = Some(Memory));
        let refusal = answer(&memory_only, &with(|config| config.require = Some(Tcp))).expect_err("nothing in common");
        assert_eq!(refusal, "transport: yours [Memory], ours [Tcp], in the same process");
    }

    /// Bytes that never leave a kernel are as safe as in shared memory. Equal addresses alone prove nothing (a proxy), nor does one
    /// kernel alone (a restored snapshot).
    #[test]
    fn contents_are_digested_where_there_is_a_wire() {
        let tcp = |worker, verify| {
            let offer = offer(worker, |config, _| {
                (config.require, config.verify) = (Some(TransportKind::Tcp), verify);
            });
            Offer { process: 2, ..offer }
        };
        let digests = |source: &Offer, target: &Offer, looped| {
            target.answer(&hello(source, target), looped, &[]).expect("agreed").digest
        };
        let (source, target) = (tcp("prefill", Verify::Auto), tcp("decode", Verify::Auto));
        assert!(!digests(&source, &target, true));
        assert!(digests(&source, &target, false));
        let elsewhere = Offer { shares: Ok("there".into()), ..target.clone() };
        assert!(digests(&source, &elsewhere, true));
        let unknown = |offer: &Offer| Offer { shares: Err("a plain file".into()), ..offer.clone() };
        assert!(digests(&source, &unknown(&target), true) && digests(&unknown(&source), &unknown(&target), true));
        assert!(digests(&source, &tcp("decode", Verify::Full), true));
        assert!(!digests(&tcp("prefill", Verify::Counts), &tcp("decode", Verify::Counts), false));
    }

    #[test]
    fn what_does_not_work_is_not_chosen_again() {
        let source = offer("prefill", same);
        let target = Offer { process: 2, ..offer("decode", same) };
        let failed = [(TransportKind::Shm, "connection refused".to_owned())];
        let agreed = target.answer(&hello(&source, &target), false, &failed).expect("something else");
        assert_eq!((agreed.transport, agreed.digest), (TransportKind::Tcp, true));
        let target = Offer { process: 2, ..offer("decode", |config, _| config.require = Some(TransportKind::Shm)) };
        let refusal = target.answer(&hello(&source, &target), false, &failed).expect_err("required");
        assert!(refusal.ends_with("ours [Shm], in different processes; Shm: connection refused"), "{refusal}");
        let target = Offer { shares: Err("the pool is a plain file".into()), ..target };
        let refusal = target.answer(&hello(&source, &target), false, &[]).expect_err("required");
        assert!(refusal.ends_with("; Shm: the pool is a plain file"), "{refusal}");
        let refusal =
            target.answer(&source.hello(&peer(1_000), ([0; 32], false), None), false, &[]).expect_err("required");
        assert!(refusal.ends_with("; Shm: the pool is a plain file"), "{refusal}");
    }

    #[test]
    fn the_source_checks_the_answer_too() {
        let source = offer("prefill", |config, _| config.require = Some(TransportKind::Tcp));
        let welcome = |worker: &str, transport| Welcome {
            proof: Proof([0; 32]),
            identity: identity(worker, 4),
            landings: 0,
            transport,
            ucx: None,
            digest: false,
            token: 0,
            ping_ms: 400,
        };
        let peer = peer(identity("decode", 4).incarnation);
        assert!(source.check(&welcome("decode", TransportKind::Tcp), &peer).is_ok());
        let downgrade = source.check(&welcome("decode", TransportKind::Memory), &peer).expect_err("not asked for");
        assert_eq!(downgrade, "transport: ours [Tcp], theirs Memory");
        let other = source.check(&welcome("prefill-7", TransportKind::Tcp), &peer).expect_err("not the one");
        assert_eq!(other, "worker: `prefill-7` answered for `decode`");
    }
}

//! API keys: who may ask, and how much.
//!
//! Only hashes are kept (SHA-256; keys are long and random, so nothing slower is needed). A key that is shown is hashed and compared with
//! every known one, each in constant time. The file is looked at every second and read again when it has changed; what cannot be
//! read then leaves the keys of before in force. Keys that keep their name keep what they have used up.
//!
//! A limit is a bucket that fills steadily and holds a minute's worth. A request takes one from the bucket of requests before anything is
//! done for it. How many tokens it takes is only known as they come, so a request is let in while its bucket of tokens is not
//! overdrawn, and overdraws it if need be.

use crate::error::Error;
use anyhow::{Context, ensure};
use ring::digest::{SHA256, digest};
use serde::Deserialize;
use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};
use subtle::ConstantTimeEq;
use tokio::time::Instant;

/// How often the file is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

type Digest = [u8; 32];

/// The known keys.
#[derive(Debug)]
pub(crate) struct Keys {
    known: RwLock<Arc<[Arc<Key>]>>,
    /// Those that do not come from the file.
    given: Vec<Arc<Key>>,
    file: Option<PathBuf>,
}

/// One key.
#[derive(Debug)]
pub(crate) struct Key {
    name: String,
    digest: Digest,
    used: Mutex<Used>,
}

#[derive(Clone, Debug)]
struct Used {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// The file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    sha256: String,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
}

impl Keys {
    /// Takes keys as they are and those of a file; `None` when neither is given.
    pub(crate) fn load(given: &[String], file: Option<&Path>) -> anyhow::Result<Option<Arc<Self>>> {
        if given.is_empty() && file.is_none() {
            return Ok(None);
        }
        ensure!(given.iter().all(|key| !key.is_empty()), "an API key must not be empty");
        let plain = |key: &String| Arc::new(Key::new("given".into(), hash(key.as_bytes()), None, None));
        let given: Vec<Arc<Key>> = given.iter().map(plain).collect();
        let mut known = given.clone();
        if let Some(file) = file {
            known.extend(read(file)?);
        }
        ensure!(!known.is_empty(), "{}: holds no [[key]]", file.unwrap_or(Path::new("")).display());
        tracing::info!(keys = known.len(), "API keys are asked for");
        Ok(Some(Arc::new(Self { known: RwLock::new(known.into()), given, file: file.map(Path::to_owned) })))
    }

    /// Returns the key that was shown, if it is one.
    pub(crate) fn find(&self, shown: &[u8]) -> Option<Arc<Key>> {
        let shown = hash(shown);
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).clone();
        // No early end: how long it takes says nothing.
        known
            .iter()
            .fold(None, |found, key| if bool::from(key.digest.ct_eq(&shown)) { Some(key.clone()) } else { found })
    }

    /// Reads the file again whenever it has changed, for ever.
    pub(crate) async fn follow(self: Arc<Self>) {
        let Some(file) = self.file.clone() else { return };
        let mut seen = stamp(&file);
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let now = stamp(&file);
            if now != seen {
                seen = now;
                self.reload(&file);
            }
        }
    }

    fn reload(&self, file: &Path) {
        let read = match read(file) {
            Ok(read) => read,
            Err(error) => return tracing::warn!(error = format!("{error:#}"), "the API keys of before stay in force"),
        };
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        for key in &read {
            if let Some(before) = known.iter().find(|before| before.name == key.name) {
                key.take_over(before);
            }
        }
        *known = self.given.iter().cloned().chain(read).collect();
        tracing::info!(keys = known.len(), "API keys read again");
    }
}

impl Key {
    fn new(name: String, digest: Digest, requests: Option<u32>, tokens: Option<u32>) -> Self {
        let bucket = |per_minute: Option<u32>| per_minute.map(|most| Bucket::full(f64::from(most), Instant::now()));
        Self { name, digest, used: Mutex::new(Used { requests: bucket(requests), tokens: bucket(tokens) }) }
    }

    /// Its owner, for logs.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A number of its own, by which those who wait share.
    pub(crate) fn number(&self) -> u64 {
        let (first, _) = self.digest.split_first_chunk().expect("a digest has more than eight bytes");
        u64::from_le_bytes(*first)
    }

    /// Takes one request, or says when to come back.
    pub(crate) fn admit(&self, now: Instant) -> Result<(), Error> {
        let limited = |what, bucket: &Bucket, retry_after| Error::RateLimited {
            message: format!("this key has used up its {} {what} a minute", bucket.most),
            retry_after,
        };
        let mut used = self.used();
        if let Some(bucket) = &mut used.tokens {
            bucket.wait(0.0, now).map_or(Ok(()), |wait| Err(limited("tokens", bucket, wait)))?;
        }
        if let Some(bucket) = &mut used.requests {
            bucket.wait(1.0, now).map_or(Ok(()), |wait| Err(limited("requests", bucket, wait)))?;
            bucket.level -= 1.0;
        }
        Ok(())
    }

    /// Charges tokens read and written.
    pub(crate) fn charge(&self, tokens: u32) {
        if let Some(bucket) = &mut self.used().tokens {
            bucket.level -= f64::from(tokens);
        }
    }

    fn take_over(&self, before: &Self) {
        let (before, mut used) = (before.used().clone(), self.used());
        let carry = |new: &mut Option<Bucket>, old: Option<Bucket>| {
            if let (Some(new), Some(old)) = (new, old) {
                (new.level, new.at) = (old.level.min(new.most), old.at);
            }
        };
        carry(&mut used.requests, before.requests);
        carry(&mut used.tokens, before.tokens);
    }

    fn used(&self) -> std::sync::MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills steadily, `most` a minute, up to `most`.
#[derive(Clone, Debug)]
struct Bucket {
    most: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(most: f64, now: Instant) -> Self {
        Self { most, level: most, at: now }
    }

    /// Fills it up to now. Returns how long until it holds `amount`, if it does not.
    fn wait(&mut self, amount: f64, now: Instant) -> Option<Duration> {
        let per_second = self.most / 60.0;
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + passed * per_second).min(self.most);
        self.at = now;
        (self.level < amount).then(|| Duration::from_secs_f64((amount - self.level) / per_second))
    }
}

fn hash(key: &[u8]) -> Digest {
    digest(&SHA256, key).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn stamp(file: &Path) -> Option<(SystemTime, u64)> {
    let metadata = fs::metadata(file).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

fn read(path: &Path) -> anyhow::Result<Vec<Arc<Key>>> {
    let text = fs::read_to_string(path).with_context(|| format!("read API keys from {}", path.display()))?;
    parse(&text).with_context(|| format!("API keys of {}", path.display()))
}

fn parse(text: &str) -> anyhow::Result<Vec<Arc<Key>>> {
    let file: File = toml::from_str(text)?;
    let mut names = HashSet::new();
    let key = |entry: Entry| {
        let name = entry.name;
        ensure!(!name.is_empty(), "name: must not be empty");
        ensure!(names.insert(name.clone()), "name: {name:?} is there twice");
        let digest = hex(&entry.sha256).with_context(|| {
            format!("key {name:?}: sha256: must be 64 hexadecimal digits, as `printf %s KEY | sha256sum` prints them")
        })?;
        for (field, limit) in
            [("requests_per_minute", entry.requests_per_minute), ("tokens_per_minute", entry.tokens_per_minute)]
        {
            ensure!(limit != Some(0), "key {name:?}: {field}: must be at least 1; leave it out for no limit");
        }
        Ok(Arc::new(Key::new(name, digest, entry.requests_per_minute, entry.tokens_per_minute)))
    };
    file.key.into_iter().map(key).collect()
}

fn hex(text: &str) -> Option<Digest> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = Digest::default();
    for (byte, digits) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `sesame`.
    const SESAME: &str = "d0c04f4b1951e4aeaaec8223ed2039e542f3aae805a6fa7f6d794e5afff5d272";

    #[test]
    fn files_are_read_and_what_is_wrong_is_named() {
        let keys = parse(&format!("[[key]]\nname = 'a'\nsha256 = '{SESAME}'\nrequests_per_minute = 2\n")).unwrap();
        assert_eq!((keys[0].name(), keys[0].digest), ("a", hash(b"sesame")));
        let check = |text: &str, expected: &str| {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{error} does not say {expected}");
        };
        check("[[key]]\nname = 'a'\nsha256 = 'sesame'", "sha256: must be 64 hexadecimal digits");
        check(&format!("[[key]]\nname = ''\nsha256 = '{SESAME}'"), "name: must not be empty");
        check(&format!("[[key]]\nname = 'a'\nsha256 = '{SESAME}'\n").repeat(2), "\"a\" is there twice");
        check(&format!("[[key]]\nname = 'a'\nsha256 = '{SESAME}'\ntokens_per_minute = 0"), "tokens_per_minute");
        check("[[key]]\nname = 'a'\nkey = 'sesame'", "unknown field");
    }

    #[test]
    fn only_known_keys_are_found() {
        let keys = Keys::load(&["sesame".into(), "other".into()], None).unwrap().unwrap();
        assert!(keys.find(b"sesame").is_some() && keys.find(b"other").is_some());
        assert!(keys.find(b"sesam").is_none() && keys.find(b"").is_none());
        assert!(Keys::load(&[], None).unwrap().is_none());
        assert!(Keys::load(&[String::new()], None).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn limits_fill_up_again() {
        let key = Key::new("a".into(), hash(b""), Some(2), Some(60));
        let retry = || match key.admit(Instant::now()) {
            Ok(()) => None,
            Err(Error::RateLimited { retry_after, .. }) => Some(retry_after.as_secs_f64().round()),
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!((retry(), retry(), retry()), (None, None, Some(30.0)));
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(retry(), None);
        key.charge(150);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(retry(), Some(30.0), "60 came in, 90 were overdrawn");
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(retry(), None);
    }

    #[test]
    fn a_changed_file_counts_and_a_broken_one_does_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let entry = |name: &str, digest: &str| {
            format!("[[key]]\nname = '{name}'\nsha256 = '{digest}'\nrequests_per_minute = 1\n")
        };
        fs::write(&file, entry("a", SESAME)).unwrap();
        let keys = Keys::load(&["given".into()], Some(file.path())).unwrap().unwrap();
        let now = Instant::now();
        assert!(keys.find(b"sesame").unwrap().admit(now).is_ok());
        fs::write(&file, "[[key]]\nname").unwrap();
        keys.reload(file.path());
        assert!(keys.find(b"sesame").is_some());
        fs::write(&file, entry("a", SESAME) + &entry("b", &SESAME.replace('d', "e"))).unwrap();
        keys.reload(file.path());
        assert!(keys.find(b"sesame").unwrap().admit(now).is_err(), "what was used up stays so");
        fs::write(&file, entry("b", &SESAME.replace('d', "e"))).unwrap();
        keys.reload(file.path());
        assert!(keys.find(b"sesame").is_none() && keys.find(b"given").is_some());
    }
}

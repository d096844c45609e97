//! The tracker's hard state: tokens, members and the deny list, in one embedded database.
//!
//! Invariants: every change is one durable transaction, committed in two phases because strangers choose keys; a
//! token's secret is never stored, only its hash; a use is consumed by a key, so the same key may ask again; the trust
//! list's epoch rises with every change of it, above that of any earlier backup; a disk that failed or was full is used
//! again as soon as it can be.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use redb::{
    AccessGuard, Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition,
    WriteTransaction, backends::FileBackend,
};
use serde::{Deserialize, Serialize};

use crate::{
    identity::{PeerId, base32},
    safe_path,
    token::TokenId,
    trust::TrustList,
};

const TOKENS: TableDefinition<'_, &str, &str> = TableDefinition::new("tokens");
const MEMBERS: TableDefinition<'_, &str, &str> = TableDefinition::new("members");
const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
const EPOCH: &str = "trust_epoch";
const PINS: &str = "tracker_pins";
const OWN_PIN: &str = "own_pin";
const ADVERTISE: &str = "advertise";
/// How long after its end a certificate can be renewed without a new token.
const RENEWABLE: Duration = Duration::from_secs(30 * 86_400);
const VERSION: (&str, &str) = ("version", "1");

/// A token as it is remembered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenRecord {
    digest: String,
    /// How many keys may join with it.
    pub uses: u32,
    /// Seconds since the epoch.
    pub expires_at: u64,
    /// Keys that did.
    pub redeemed_by: Vec<String>,
}

/// A member as it is remembered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Seconds since the epoch.
    pub joined_at: u64,
    /// When its newest certificate ends, seconds since the epoch.
    pub certified_until: u64,
    /// Thrown out.
    pub revoked: bool,
}

/// Why a token is not honoured; for the log, never for the caller.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    /// No such token.
    #[error("unknown token")]
    Unknown,
    /// The secret is wrong.
    #[error("wrong secret")]
    WrongSecret,
    /// Its time is over.
    #[error("token expired")]
    Expired,
    /// Other keys have used it up.
    #[error("token used up")]
    UsedUp,
    /// The key was thrown out.
    #[error("the key was revoked")]
    Revoked,
    /// The key never joined.
    #[error("not a member")]
    NotAMember,
    /// Away for too long.
    #[error("the last certificate ended more than 30 days ago")]
    TooLate,
}

/// The database of the one tracker that issues certificates.
pub struct Registry {
    path: PathBuf,
    /// None after a failure: the library wants a database opened again that could not be read or written.
    db: Mutex<Option<Database>>,
}

impl Registry {
    /// Opens or creates the database.
    ///
    /// # Errors
    /// If it is damaged, in use, or of a newer version; it is never replaced.
    pub fn open(path: &Path) -> Result<Self> {
        let registry = Self {
            path: path.to_owned(),
            db: Mutex::new(Some(open(path)?)),
        };
        let version = registry.write(|txn| {
            txn.open_table(TOKENS)?;
            txn.open_table(MEMBERS)?;
            let mut meta = txn.open_table(META)?;
            let version = meta.get(VERSION.0)?.map(|v| v.value().to_owned());
            if version.is_none() {
                meta.insert(VERSION.0, VERSION.1)?;
            }
            Ok(version.unwrap_or_else(|| VERSION.1.to_owned()))
        })?;
        anyhow::ensure!(
            version == VERSION.1,
            "{} was written by a newer sprat (version {version})",
            path.display()
        );
        Ok(registry)
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let mut slot = self.db.lock().expect("no panic while the lock is held");
        let db = slot.take().map_or_else(|| open(&self.path), Ok)?;
        let outcome = work(&db).with_context(|| self.path.display().to_string());
        if outcome.is_ok() {
            *slot = Some(db);
        }
        outcome
    }

    fn read<T>(&self, question: impl FnOnce(&ReadTransaction) -> Result<T>) -> Result<T> {
        self.with(|db| question(&db.begin_read()?))
    }

    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T>) -> Result<T> {
        self.with(|db| {
            let mut txn = db.begin_write()?;
            txn.set_two_phase_commit(true);
            let outcome = change(&txn)?;
            txn.commit()?;
            Ok(outcome)
        })
    }

    /// Remembers a token by the hash of its secret.
    ///
    /// # Errors
    /// As the database answers.
    pub fn add_token(
        &self,
        id: &TokenId,
        digest: [u8; 32],
        uses: u32,
        ttl: Duration,
    ) -> Result<()> {
        let expires_at = now() + ttl.as_secs();
        let record = TokenRecord {
            digest: base32(&digest),
            uses,
            expires_at,
            redeemed_by: Vec::new(),
        };
        self.write(|txn| {
            let mut tokens = txn.open_table(TOKENS)?;
            // Tokens a month past their end tell nobody anything.
            tokens.retain(|_, record| {
                read::<TokenRecord>(record).is_ok_and(|r| r.expires_at + 30 * 86_400 > now())
            })?;
            tokens.insert(
                base32(id).as_str(),
                serde_json::to_string(&record)?.as_str(),
            )?;
            Ok(())
        })
    }

    /// Consumes a use of a token for `peer`, who becomes a member with a certificate for `life`; a key that has used it
    /// already just succeeds.
    ///
    /// # Errors
    /// The outer one as the database answers, the inner one says why not.
    pub fn redeem(
        &self,
        id: &str,
        digest: [u8; 32],
        peer: PeerId,
        life: Duration,
    ) -> Result<Result<(), JoinRefusal>> {
        let name = peer.to_string();
        self.write(|txn| {
            let mut tokens = txn.open_table(TOKENS)?;
            let Some(mut record) = tokens
                .get(id)?
                .map(|r| read::<TokenRecord>(r.value()))
                .transpose()?
            else {
                return Ok(Err(JoinRefusal::Unknown));
            };
            if !same(record.digest.as_bytes(), base32(&digest).as_bytes()) {
                return Ok(Err(JoinRefusal::WrongSecret));
            }
            if record.expires_at <= now() {
                return Ok(Err(JoinRefusal::Expired));
            }
            let mut members = txn.open_table(MEMBERS)?;
            if member(&members, &name)?.is_some_and(|member| member.revoked) {
                return Ok(Err(JoinRefusal::Revoked));
            }
            if !record.redeemed_by.contains(&name) {
                if record.redeemed_by.len() >= record.uses as usize {
                    return Ok(Err(JoinRefusal::UsedUp));
                }
                record.redeemed_by.push(name.clone());
                tokens.insert(id, serde_json::to_string(&record)?.as_str())?;
            }
            let member = MemberRecord {
                joined_at: now(),
                certified_until: now() + life.as_secs(),
                revoked: false,
            };
            members.insert(name.as_str(), serde_json::to_string(&member)?.as_str())?;
            Ok(Ok(()))
        })
    }

    /// Notes that a member's key is certified for another `life`, if it may be.
    ///
    /// # Errors
    /// As [`Registry::redeem`].
    pub fn renew(&self, peer: PeerId, life: Duration) -> Result<Result<(), JoinRefusal>> {
        let name = peer.to_string();
        self.write(|txn| {
            let mut members = txn.open_table(MEMBERS)?;
            let mut record = match member(&members, &name)? {
                None => return Ok(Err(JoinRefusal::NotAMember)),
                Some(member) if member.revoked => return Ok(Err(JoinRefusal::Revoked)),
                Some(member) if member.certified_until + RENEWABLE.as_secs() < now() => {
                    return Ok(Err(JoinRefusal::TooLate));
                }
                Some(member) => member,
            };
            record.certified_until = now() + life.as_secs();
            members.insert(name.as_str(), serde_json::to_string(&record)?.as_str())?;
            Ok(Ok(()))
        })
    }

    /// Throws a member out or lets it in again; says whether anything changed. The epoch rises with it.
    ///
    /// # Errors
    /// As the database answers.
    pub fn set_revoked(&self, peer: PeerId, revoked: bool) -> Result<bool> {
        let name = peer.to_string();
        self.write(|txn| {
            let mut members = txn.open_table(MEMBERS)?;
            let Some(mut record) = member(&members, &name)? else {
                return Ok(false);
            };
            if record.revoked == revoked {
                return Ok(false);
            }
            record.revoked = revoked;
            members.insert(name.as_str(), serde_json::to_string(&record)?.as_str())?;
            raise_epoch(txn)?;
            Ok(true)
        })
    }

    /// Announces the keys of tracker certificates that the authority did not sign; former ones stay believed, so that
    /// a key can be announced before its use.
    ///
    /// # Errors
    /// As the database answers.
    pub fn add_pin(&self, pin: [u8; 32]) -> Result<()> {
        self.write(|txn| {
            let mut meta = txn.open_table(META)?;
            let mut pins: Vec<String> = meta
                .get(PINS)?
                .map(|p| read(p.value()))
                .transpose()?
                .unwrap_or_default();
            if pins.contains(&base32(&pin)) {
                return Ok(());
            }
            pins.push(base32(&pin));
            meta.insert(PINS, serde_json::to_string(&pins)?.as_str())?;
            drop(meta);
            raise_epoch(txn)
        })
    }

    /// The key of the certificate from elsewhere that the tracker shows now; tokens made while it does not run carry it.
    ///
    /// # Errors
    /// As the database answers.
    pub fn own_pin(&self) -> Result<Option<[u8; 32]>> {
        self.read(|txn| {
            let pin = txn
                .open_table(META)?
                .get(OWN_PIN)?
                .and_then(|pin| crate::identity::unbase32(pin.value()));
            Ok(pin)
        })
    }

    /// Remembers it.
    ///
    /// # Errors
    /// As the database answers.
    pub fn set_own_pin(&self, pin: Option<[u8; 32]>) -> Result<()> {
        self.write(|txn| {
            let mut meta = txn.open_table(META)?;
            match pin {
                Some(pin) => meta.insert(OWN_PIN, base32(&pin).as_str())?,
                None => meta.remove(OWN_PIN)?,
            };
            Ok(())
        })
    }

    /// What the authority is to sign.
    ///
    /// # Errors
    /// As the database answers.
    pub fn trust_list(&self) -> Result<TrustList> {
        self.read(|txn| {
            let meta = txn.open_table(META)?;
            let pins: Vec<String> = meta
                .get(PINS)?
                .map(|p| read(p.value()))
                .transpose()?
                .unwrap_or_default();
            let members = all_members(txn)?;
            Ok(TrustList {
                epoch: meta
                    .get(EPOCH)?
                    .map(|e| e.value().parse())
                    .transpose()?
                    .unwrap_or(0),
                tracker_pins: pins
                    .iter()
                    .filter_map(|pin| crate::identity::unbase32(pin))
                    .collect(),
                denied: members
                    .into_iter()
                    .filter(|(_, member)| member.revoked)
                    .map(|(peer, _)| peer)
                    .collect(),
            })
        })
    }

    /// Everybody who ever joined.
    ///
    /// # Errors
    /// As the database answers.
    pub fn members(&self) -> Result<Vec<(PeerId, MemberRecord)>> {
        self.read(all_members)
    }

    /// All tokens that are remembered.
    ///
    /// # Errors
    /// As the database answers.
    pub fn tokens(&self) -> Result<Vec<(String, TokenRecord)>> {
        self.read(|txn| {
            let rows = txn.open_table(TOKENS)?;
            let row = |(k, v): (AccessGuard<'_, &str>, AccessGuard<'_, &str>)| {
                Ok((k.value().to_owned(), read(v.value())?))
            };
            rows.iter()?
                .map(|found| found.map_err(Into::into).and_then(row))
                .collect()
        })
    }

    /// Where joiners are told to find the tracker.
    ///
    /// # Errors
    /// As the database answers.
    pub fn advertised(&self) -> Result<Vec<String>> {
        self.read(|txn| {
            let advertised = txn
                .open_table(META)?
                .get(ADVERTISE)?
                .map(|a| read(a.value()))
                .transpose()?;
            Ok(advertised.unwrap_or_default())
        })
    }

    /// Remembers it.
    ///
    /// # Errors
    /// As the database answers.
    pub fn set_advertised(&self, addresses: &[String]) -> Result<()> {
        self.write(|txn| {
            txn.open_table(META)?
                .insert(ADVERTISE, serde_json::to_string(addresses)?.as_str())?;
            Ok(())
        })
    }
}

fn open(path: &Path) -> Result<Database> {
    let named = || format!("opening {}", path.display());
    let backend = FileBackend::new(safe_path::create_private(path).with_context(named)?)
        .with_context(named)?;
    // Without the check, redb may panic on a file that something else has damaged.
    Database::builder()
        .set_check_integrity_on_open(true)
        .create_with_backend(backend)
        .with_context(named)
}

/// By the clock, so that what a restored backup signs is newer than what the peers heard before.
fn raise_epoch(txn: &WriteTransaction) -> Result<()> {
    let mut meta = txn.open_table(META)?;
    let epoch: u64 = meta
        .get(EPOCH)?
        .map(|e| e.value().parse())
        .transpose()?
        .unwrap_or(0);
    meta.insert(EPOCH, now().max(epoch + 1).to_string().as_str())?;
    Ok(())
}

fn all_members(txn: &ReadTransaction) -> Result<Vec<(PeerId, MemberRecord)>> {
    let rows = txn.open_table(MEMBERS)?;
    let row = |(k, v): (AccessGuard<'_, &str>, AccessGuard<'_, &str>)| {
        Ok((k.value().parse()?, read(v.value())?))
    };
    rows.iter()?
        .map(|found| found.map_err(Into::into).and_then(row))
        .collect()
}

fn member(
    members: &impl ReadableTable<&'static str, &'static str>,
    name: &str,
) -> Result<Option<MemberRecord>> {
    members
        .get(name)?
        .map(|record| read(record.value()))
        .transpose()
}

fn read<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T> {
    serde_json::from_str(text).context("a damaged record in the tracker's database")
}

/// Compares without telling by its duration where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: TokenId = [1; 5];
    const HOUR: Duration = Duration::from_secs(3600);

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&dir.path().join("tracker.redb")).unwrap();
        (dir, registry)
    }

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    #[test]
    fn a_use_belongs_to_a_key() {
        let (_dir, registry) = registry();
        registry.add_token(&ID, [9; 32], 2, HOUR).unwrap();
        let redeem = |digest, n| {
            registry
                .redeem(&base32(&ID), digest, peer(n), HOUR)
                .unwrap()
        };
        assert_eq!(redeem([8; 32], 1), Err(JoinRefusal::WrongSecret));
        assert_eq!(
            (redeem([9; 32], 1), redeem([9; 32], 1), redeem([9; 32], 2)),
            (Ok(()), Ok(()), Ok(()))
        );
        assert_eq!(redeem([9; 32], 3), Err(JoinRefusal::UsedUp));
        assert_eq!(redeem([9; 32], 2), Ok(()));
        assert_eq!(
            registry.redeem("nonsense", [9; 32], peer(1), HOUR).unwrap(),
            Err(JoinRefusal::Unknown)
        );
        registry
            .add_token(&[2; 5], [9; 32], 1, Duration::ZERO)
            .unwrap();
        assert_eq!(
            registry
                .redeem(&base32(&[2; 5]), [9; 32], peer(1), HOUR)
                .unwrap(),
            Err(JoinRefusal::Expired)
        );
    }

    #[test]
    fn fifty_at_once_on_one_use_admit_exactly_one() {
        let (_dir, registry) = registry();
        registry.add_token(&ID, [9; 32], 1, HOUR).unwrap();
        let registry = &registry;
        let admitted: usize = std::thread::scope(|scope| {
            let joins: Vec<_> = (0..50)
                .map(|n| {
                    scope.spawn(move || {
                        registry
                            .redeem(&base32(&ID), [9; 32], peer(n), HOUR)
                            .unwrap()
                            .is_ok()
                    })
                })
                .collect();
            joins
                .into_iter()
                .map(|join| usize::from(join.join().unwrap()))
                .sum()
        });
        assert_eq!(admitted, 1);
    }

    #[test]
    fn revocation_and_pins_raise_the_epoch_and_survive_a_restart() {
        let (dir, registry) = registry();
        registry.add_token(&ID, [9; 32], 1, HOUR).unwrap();
        assert!(!registry.set_revoked(peer(1), true).unwrap());
        registry
            .redeem(&base32(&ID), [9; 32], peer(1), HOUR)
            .unwrap()
            .unwrap();
        assert!(registry.set_revoked(peer(1), true).unwrap());
        assert!(!registry.set_revoked(peer(1), true).unwrap());
        let first = registry.trust_list().unwrap().epoch;
        assert!(
            first >= now() - 60,
            "a list of a restored backup must be newer than any before: {first}"
        );
        registry.add_pin([5; 32]).unwrap();
        registry.add_pin([5; 32]).unwrap();
        drop(registry);
        let registry = Registry::open(&dir.path().join("tracker.redb")).unwrap();
        let list = registry.trust_list().unwrap();
        assert_eq!(
            (list.denied.contains(&peer(1)), list.tracker_pins.len()),
            (true, 1)
        );
        assert!(list.epoch > first, "{} after {first}", list.epoch);
        assert_eq!(
            registry.renew(peer(1), HOUR).unwrap(),
            Err(JoinRefusal::Revoked)
        );
        assert_eq!(
            registry
                .redeem(&base32(&ID), [9; 32], peer(1), HOUR)
                .unwrap(),
            Err(JoinRefusal::Revoked)
        );
        assert!(registry.set_revoked(peer(1), false).unwrap());
        assert_eq!(registry.renew(peer(1), HOUR).unwrap(), Ok(()));
        assert_eq!(
            registry.renew(peer(2), HOUR).unwrap(),
            Err(JoinRefusal::NotAMember)
        );
    }

    #[test]
    fn a_damaged_database_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tracker.redb");
        std::fs::write(
            &path,
            b"not a database at all, but longer than its header would be",
        )
        .unwrap();
        assert!(Registry::open(&path).is_err());
        assert!(std::fs::read(&path).unwrap().starts_with(b"not a database"));
    }
}

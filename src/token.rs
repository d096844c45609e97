//! Join tokens as people carry them: one link, pasted once.
//!
//! `sprat://HOST:PORT/PIN.ID.SECRET.CHECK` — PIN is `a` (the authority's key) or `t` (the tracker's own certificate)
//! and 52 base32 characters of SHA-256 over that public key; ID is 8 characters, SECRET 26 (128 bits), CHECK 6
//! characters of SHA-256 over everything between `//` and the last dot, so that a typo is found before anything is
//! dialled.
//!
//! Invariant: a token without a pin does not exist, and a secret is never shown by `Debug`.

use std::{fmt, str::FromStr};

use ring::rand::{SecureRandom, SystemRandom};

use crate::identity::{base32, sha256, unbase32};

const SCHEME: &str = "sprat://";
const CHECK_LEN: usize = 6;

/// Whose key the joiner must meet before it says a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// The network's authority signed the certificate that the tracker shows.
    Authority([u8; 32]),
    /// The tracker shows this very key (a certificate from elsewhere).
    Tracker([u8; 32]),
}

/// The public part of a token, 5 random bytes.
pub type TokenId = [u8; 5];

/// The secret part: 128 random bits.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 16]);

impl Secret {
    /// What the tracker stores instead of the secret.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        sha256(&self.0)
    }

    /// The 26 characters that go over the wire.
    #[must_use]
    pub fn reveal(&self) -> String {
        base32(&self.0)
    }

    /// Reads what [`Secret::reveal`] wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        unbase32(text).map(Self)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Lets a machine join once (or as often as its maker said).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// Where the tracker answers, "HOST:PORT".
    pub address: String,
    /// Whom to trust there.
    pub pin: Pin,
    /// Names the token at the tracker.
    pub id: TokenId,
    /// Proves that we were invited.
    pub secret: Secret,
}

/// Which part of a pasted link is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not our scheme.
    #[error("a join link begins with sprat://HOST:PORT/")]
    Scheme,
    /// No host or port.
    #[error("the join link names no HOST:PORT")]
    Address,
    /// A part is missing or there are too many.
    #[error("the join link is cut: it needs four parts after the address, PIN.ID.SECRET.CHECK")]
    Parts,
    /// The check does not match.
    #[error(
        "the join link has a typo: its last six characters do not match the rest; copy it again"
    )]
    Check,
    /// The pin is not one.
    #[error(
        "the join link carries no usable pin; make a new one with `sprat tracker token create`"
    )]
    Pin,
    /// Id or secret is malformed.
    #[error("the join link's id or secret is malformed; copy it again")]
    Secret,
    /// No random numbers.
    #[error("this machine gives no random numbers")]
    Random,
}

impl JoinToken {
    /// A fresh token for the tracker at `address`.
    ///
    /// # Errors
    /// [`TokenError::Random`]
    pub fn generate(address: String, pin: Pin) -> Result<Self, TokenError> {
        let (mut id, mut secret) = ([0; 5], [0; 16]);
        let random = SystemRandom::new();
        random.fill(&mut id).map_err(|_| TokenError::Random)?;
        random.fill(&mut secret).map_err(|_| TokenError::Random)?;
        Ok(Self {
            address,
            pin,
            id,
            secret: Secret(secret),
        })
    }
}

fn check(text: &str) -> String {
    base32(&sha256(text.as_bytes()))[..CHECK_LEN].to_owned()
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, pin) = match &self.pin {
            Pin::Authority(pin) => ('a', pin),
            Pin::Tracker(pin) => ('t', pin),
        };
        let text = format!(
            "{}/{kind}{}.{}.{}",
            self.address,
            base32(pin),
            base32(&self.id),
            self.secret.reveal()
        );
        write!(f, "{SCHEME}{text}.{}", check(&text))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    /// White space around and inside the link (a wrapped mail) is ignored.
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text: String = text.split_whitespace().collect();
        let text = text.strip_prefix(SCHEME).ok_or(TokenError::Scheme)?;
        let (address, rest) = text.split_once('/').ok_or(TokenError::Address)?;
        let (host, port) = address.rsplit_once(':').ok_or(TokenError::Address)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(TokenError::Address);
        }
        let [pin, id, secret, given] = rest.split('.').collect::<Vec<_>>()[..] else {
            return Err(TokenError::Parts);
        };
        if check(&text[..text.len() - given.len() - 1]) != given {
            return Err(TokenError::Check);
        }
        let pin = match (pin.get(..1), pin.get(1..).and_then(unbase32)) {
            (Some("a"), Some(hash)) => Pin::Authority(hash),
            (Some("t"), Some(hash)) => Pin::Tracker(hash),
            _ => return Err(TokenError::Pin),
        };
        let id = unbase32(id).ok_or(TokenError::Secret)?;
        let secret = Secret::parse(secret).ok_or(TokenError::Secret)?;
        Ok(Self {
            address: address.to_owned(),
            pin,
            id,
            secret,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> JoinToken {
        JoinToken::generate("[fd00::1]:7700".into(), Pin::Authority([7; 32])).unwrap()
    }

    #[test]
    fn text_form_round_trips_even_when_wrapped_by_a_mail() {
        let token = token();
        let text = token.to_string();
        assert_eq!(text.parse::<JoinToken>().unwrap(), token);
        let wrapped = format!(" {}\n  {}\r\n", &text[..40], &text[40..]);
        assert_eq!(wrapped.parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains(&token.secret.reveal()));
    }

    #[test]
    fn every_single_character_typo_is_found() {
        let text = token().to_string();
        for i in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[i] = if bytes[i] == b'x' { b'y' } else { b'x' };
            let bad = String::from_utf8(bytes).unwrap();
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
            assert!(text[..i].parse::<JoinToken>().is_err());
        }
    }

    #[test]
    fn each_error_says_which_part() {
        assert_eq!(
            "https://a:1/x".parse::<JoinToken>(),
            Err(TokenError::Scheme)
        );
        assert_eq!("sprat://a/x".parse::<JoinToken>(), Err(TokenError::Address));
        assert_eq!(
            "sprat://a:7700/x.y".parse::<JoinToken>(),
            Err(TokenError::Parts)
        );
        let text = format!(
            "a:1/{}.{}.{}",
            base32(&[1; 33]),
            base32(&[2; 5]),
            base32(&[3; 16])
        );
        assert_eq!(
            format!("sprat://{text}.{}", check(&text)).parse::<JoinToken>(),
            Err(TokenError::Pin)
        );
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC*") {
            let _ = text.parse::<JoinToken>();
            let _ = format!("sprat://{text}").parse::<JoinToken>();
            let _ = format!("sprat://h:1/{text}").parse::<JoinToken>();
        }
    }
}

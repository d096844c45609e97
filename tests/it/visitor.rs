//! Callers from outside: whoever has, or has not, a certificate, and any call of any service by its path.
//!
//! The rules a visitor judges servers by are none: these tests are about whom servers let in.

use std::{fs, path::Path, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
};
use sprat::{
    identity::{Identity, Key, PEER_FILES},
    net::{self, Connection},
    tls,
};
use tonic::{Code, Request, client::Grpc};
use tonic_prost::ProstCodec;

/// A certificate to show, with its key.
pub struct Badge {
    chain: Vec<CertificateDer<'static>>,
    key: Key,
}

impl Badge {
    /// The identity in a folder with files of these names.
    pub fn load(folder: &Path, files: [&str; 3]) -> Self {
        let Identity {
            key,
            certificate,
            authority,
        } = Identity::load(folder, files).unwrap().unwrap();
        Self {
            chain: vec![certificate, authority],
            key,
        }
    }

    /// The identity of a peer with this state directory.
    pub fn of_peer(state_dir: &Path) -> Self {
        Self::load(&state_dir.join("identity"), PEER_FILES)
    }

    /// A certificate for these names that its own key signed.
    pub fn self_signed(names: impl FnOnce(&Key) -> Vec<String>) -> Self {
        let key = Key::generate().unwrap();
        let pair = rcgen::KeyPair::from_pem(&key.to_pem()).unwrap();
        let certificate = rcgen::CertificateParams::new(names(&key))
            .unwrap()
            .self_signed(&pair)
            .unwrap();
        Self {
            chain: vec![certificate.der().clone()],
            key,
        }
    }

    /// The rules of a server that shows it to everybody.
    pub fn server(&self) -> Arc<ServerConfig> {
        let builder = ServerConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap();
        Arc::new(
            builder
                .with_no_client_auth()
                .with_single_cert(self.chain.clone(), self.key.to_der())
                .unwrap(),
        )
    }

    /// This certificate with a key that is not its own.
    pub fn with_key_of(self, other: &Self) -> Self {
        Self {
            chain: self.chain,
            key: Key::from_pem(&other.key.to_pem()).unwrap(),
        }
    }
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection was not accepted; nothing was answered.
    Refused,
    /// A service answered.
    Status(Code),
}

/// Connects to `address` with this certificate, or none; `name` is the server name to ask for.
pub async fn connect(
    address: &str,
    badge: Option<&Badge>,
    name: Option<&'static str>,
) -> Option<Connection> {
    let config = config(badge, name.is_some());
    net::dial(
        &[address.to_owned()],
        config,
        name.unwrap_or("nobody.invalid"),
        net::CONTROL,
    )
    .await
    .ok()
}

fn config(badge: Option<&Badge>, sends_name: bool) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match badge {
        None => builder.with_no_client_auth(),
        Some(badge) => builder.with_client_cert_resolver(Arc::new(
            rustls::sign::SingleCertAndKey::from(certified(badge)),
        )),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = sends_name;
    Arc::new(config)
}

/// Certificate and key, whether they belong together or not.
fn certified(badge: &Badge) -> rustls::sign::CertifiedKey {
    let key: PrivateKeyDer<'static> = badge.key.to_der();
    rustls::sign::CertifiedKey::new(
        badge.chain.clone(),
        tls::provider().key_provider.load_private_key(key).unwrap(),
    )
}

/// Calls `path` with one empty message.
pub async fn call(connection: Option<Connection>, path: &str) -> Answer {
    let Some(connection) = connection else {
        return Answer::Refused;
    };
    let mut client = Grpc::with_origin(connection.clone(), connection.origin());
    if client.ready().await.is_err() {
        return Answer::Refused;
    }
    let first = async {
        let codec = ProstCodec::<(), ()>::default();
        let answer = client
            .server_streaming(Request::new(()), path.parse().unwrap(), codec)
            .await?;
        answer.into_inner().message().await
    };
    match tokio::time::timeout(Duration::from_secs(10), first).await {
        Ok(Err(status)) if std::error::Error::source(&status).is_some() => Answer::Refused,
        Ok(Err(status)) => Answer::Status(status.code()),
        Ok(Ok(_)) => Answer::Status(Code::Ok),
        Err(_) => Answer::Status(Code::DeadlineExceeded),
    }
}

/// The path of every call that the `.proto` files define, and of those that every member may make.
pub fn paths() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/sprat/v1");
    let mut paths: Vec<String> = [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ]
    .map(String::from)
    .into();
    for file in fs::read_dir(folder).unwrap() {
        let mut service = String::new();
        for line in fs::read_to_string(file.unwrap().path()).unwrap().lines() {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["service", name, ..] => service = name.into(),
                ["rpc", call, ..] => {
                    paths.push(format!(
                        "/sprat.v1.{service}/{}",
                        call.split('(').next().unwrap()
                    ));
                }
                _ => {}
            }
        }
    }
    assert!(paths.len() >= 22, "{paths:?}");
    paths
}

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 was chosen".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &tls::provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

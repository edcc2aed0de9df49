//! TLS 1.3 between friends. Both sides authenticate with raw public keys (RFC 7250). There are no
//! certificates, server names, session tickets or early data.

use super::FriendList;
use crate::wire::NodeKey;
use crate::wire::tracker::Identity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};
use std::fmt;
use std::sync::Arc;

/// Placeholder for the server name that rustls requires. It is neither sent nor checked; only the
/// key identifies the server.
pub const NO_NAME: &str = "friend.invalid";

/// TLS configuration of the server: accepts the key of any current friend in `friends`.
///
/// # Errors
/// Fails only if the protocol version or the key does not fit the provider, which does not happen
/// with the fixed configuration.
pub fn server_config(
    identity: &Identity,
    friends: Arc<FriendList>,
) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let key = Arc::new(certified(identity, &provider)?);
    let verifier = Arc::new(FriendClientVerifier {
        friends,
        algorithms: provider.signature_verification_algorithms,
    });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key)));
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// TLS configuration for connections to the friend with the key `friend`. It accepts no other key.
///
/// # Errors
/// Fails only if the protocol version or the key does not fit the provider, which does not happen
/// with the fixed configuration.
pub fn client_config(identity: &Identity, friend: NodeKey) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let key = Arc::new(certified(identity, &provider)?);
    let verifier = Arc::new(FriendServerVerifier {
        friend,
        algorithms: provider.signature_verification_algorithms,
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key)));
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// Provider with two cipher suites: AES-128-GCM, which is twice as fast as the others on processors
/// with AES instructions, and ChaCha20-Poly1305.
fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

fn certified(identity: &Identity, provider: &CryptoProvider) -> Result<CertifiedKey, Error> {
    let secret = PrivateKeyDer::Pkcs8(identity.to_pkcs8().into());
    let secret = provider.key_provider.load_private_key(secret)?;
    Ok(CertifiedKey::new(vec![CertificateDer::from(identity.key().to_info())], secret))
}

/// Server side: accepts the key of any friend.
struct FriendClientVerifier {
    friends: Arc<FriendList>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Client side: accepts the key of one friend.
struct FriendServerVerifier {
    friend: NodeKey,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Rejects an unknown key. rustls sends it to the other side as the alert *access_denied*.
const DENIED: Error = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);

/// The methods that [`ClientCertVerifier`] and [`ServerCertVerifier`] share in shape but not
/// through a trait. They accept TLS 1.3 signatures by raw ed25519 keys only.
macro_rules! raw_ed25519_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            // Not reached: the configuration allows TLS 1.3 only.
            Err(Error::General("only TLS 1.3 is spoken".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            key: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let key = SubjectPublicKeyInfoDer::from(key.as_ref());
            verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ClientCertVerifier for FriendClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let friend = NodeKey::from_info(key).and_then(|key| self.friends.get(&key));
        friend.map(|_| ClientCertVerified::assertion()).ok_or(DENIED)
    }

    raw_ed25519_signatures!();
}

impl ServerCertVerifier for FriendServerVerifier {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match NodeKey::from_info(key) {
            Some(key) if key == self.friend => Ok(ServerCertVerified::assertion()),
            Some(key) => Err(Error::General(format!("its key is {key}, not {}", self.friend))),
            None => Err(DENIED),
        }
    }

    raw_ed25519_signatures!();
}

impl fmt::Debug for FriendClientVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FriendClientVerifier")
    }
}

impl fmt::Debug for FriendServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FriendServerVerifier({})", self.friend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConnection, ServerConnection};

    fn identity(n: u8) -> Identity {
        Identity::from_seed(&[n; 32])
    }

    fn friends_of(own: u8, others: &[u8]) -> Arc<FriendList> {
        let friends = others
            .iter()
            .map(|n| format!("f{n}={}", identity(*n).key()).parse().unwrap())
            .collect();
        Arc::new(FriendList::new(friends, None, identity(own).key()))
    }

    /// Runs a handshake in memory. Returns its result at the server and at the client.
    fn shake_hands(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    ) -> (Result<NodeKey, Error>, Result<(), Error>) {
        let mut client = ClientConnection::new(client, NO_NAME.try_into().unwrap()).unwrap();
        let mut server = ServerConnection::new(server).unwrap();
        let (mut at_server, mut at_client) = (Ok(()), Ok(()));
        for _ in 0..4 {
            let mut records = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut records).unwrap();
            }
            while !records.is_empty() {
                server
                    .read_tls(&mut {
                        let all = std::mem::take(&mut records);
                        std::io::Cursor::new(all)
                    })
                    .unwrap();
                at_server = at_server.and(server.process_new_packets().map(drop));
            }
            while server.wants_write() {
                server.write_tls(&mut records).unwrap();
            }
            if !records.is_empty() {
                client.read_tls(&mut &records[..]).unwrap();
                at_client = at_client.and(client.process_new_packets().map(drop));
            }
        }
        let key = || NodeKey::from_info(&server.peer_certificates().unwrap()[0]).unwrap();
        (at_server.map(|()| key()), at_client)
    }

    #[test]
    fn friend_with_listed_key_is_accepted() {
        let server = server_config(&identity(1), friends_of(1, &[2, 3])).unwrap();
        let client = client_config(&identity(2), identity(1).key()).unwrap();
        let (at_server, at_client) = shake_hands(client, server);
        assert_eq!((at_server, at_client), (Ok(identity(2).key()), Ok(())));
    }

    #[test]
    fn stranger_gets_access_denied_alert() {
        let server = server_config(&identity(1), friends_of(1, &[2])).unwrap();
        let client = client_config(&identity(9), identity(1).key()).unwrap();
        let (at_server, at_client) = shake_hands(client, server);
        assert_eq!(at_server, Err(DENIED));
        assert_eq!(at_client, Err(Error::AlertReceived(rustls::AlertDescription::AccessDenied)));
    }

    #[test]
    fn server_with_another_key_is_refused_with_both_keys_in_error() {
        let server = server_config(&identity(1), friends_of(1, &[2])).unwrap();
        let client = client_config(&identity(2), identity(5).key()).unwrap();
        let (_, at_client) = shake_hands(client, server);
        let error = at_client.unwrap_err().to_string();
        assert!([1, 5].iter().all(|n| error.contains(&identity(*n).key().to_string())), "{error}");
    }

    #[test]
    fn client_without_a_raw_key_is_refused() {
        let server = server_config(&identity(1), friends_of(1, &[2])).unwrap();
        let verifier = Arc::new(FriendServerVerifier {
            friend: identity(1).key(),
            algorithms: provider().signature_verification_algorithms,
        });
        let client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        assert!(shake_hands(Arc::new(client), server).0.is_err());
    }

    #[test]
    fn removed_friend_is_refused() {
        let file = std::env::temp_dir().join(format!("peerix-removed-{}", std::process::id()));
        std::fs::write(&file, format!("f={}", identity(2).key())).unwrap();
        let friends = Arc::new(FriendList::new(Vec::new(), Some(file.clone()), identity(1).key()));
        let server = server_config(&identity(1), friends.clone()).unwrap();
        let client = client_config(&identity(2), identity(1).key()).unwrap();
        assert!(shake_hands(client.clone(), server.clone()).0.is_ok());
        std::fs::write(&file, "").unwrap();
        friends.reload();
        assert_eq!(shake_hands(client, server).0, Err(DENIED));
        std::fs::remove_file(&file).unwrap();
    }
}

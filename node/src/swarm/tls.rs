//! TLS 1.3 over TCP as libp2p has it, with the cipher that the processor is fastest at.
//!
//! What travels are gigabytes of ciphertexts, which need no second secrecy, only integrity and speed. libp2p's own
//! configuration puts ChaCha20 first, and so does Noise, which knows nothing else; with instructions for AES its Galois mode
//! takes a fraction of the time. Certificates, their generation and their verification are libp2p's; what is ours is the order
//! of the ciphers. A peer with libp2p's configuration and this one understand each other.
//!
//! See <https://github.com/libp2p/specs/blob/master/tls/tls.md>.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::io::BufReader;
use futures::{AsyncRead, AsyncWrite, FutureExt as _};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::PeerId;
use libp2p::core::UpgradeInfo;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use libp2p::identity::Keypair;
use libp2p::tls::certificate;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::pki_types::{CertificateDer, IpAddr, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName, PeerMisbehaved, ServerConfig, SignatureScheme,
    SupportedCipherSuite,
};

/// What both ends say that they speak inside of TLS.
const ALPN: &[u8] = b"libp2p";

/// Bytes that are read from a socket at once, for rustls itself reads 4 KiB at a time.
const READ_BYTES: usize = 64 << 10;

/// Why a connection could not be secured.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    #[error("no certificate could be made: {0}")]
    Certificate(#[from] certificate::GenError),
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
    #[error("the handshake failed: {0}")]
    Handshake(#[from] io::Error),
    #[error("the peer's certificate is not one of libp2p's: {0}")]
    Peer(#[from] certificate::ParseError),
    #[error("the peer has shown no certificate")]
    NoCertificate,
}

/// The upgrade of a TCP connection to a secure one.
#[derive(Clone)]
pub(super) struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// With a certificate of this peer's identity.
    pub(super) fn new(identity: &Keypair) -> Result<Self, TlsError> {
        let provider = Arc::new(CryptoProvider { cipher_suites: ciphers(), ..ring::default_provider() });
        let (certificate, key) = certificate::generate(identity)?;
        // Not by way of the builders' own checks, which know no extension of libp2p's.
        let key = provider.key_provider.load_private_key(key)?;
        let own = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)));
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Verifier))
            .with_cert_resolver(Arc::clone(&own) as _);
        server.alpn_protocols = vec![ALPN.to_vec()];
        // Every connection proves its identity anew.
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier))
            .with_client_cert_resolver(own);
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();
        // The specification forbids to name the server.
        client.enable_sni = false;
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }
}

/// The ciphers of TLS 1.3, the fastest first.
fn ciphers() -> Vec<SupportedCipherSuite> {
    let aes = [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];
    let chacha = [cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    if has_aes() { [&aes[..], &chacha].concat() } else { [&chacha[..], &aes].concat() }
}

/// Whether the processor has instructions for AES and for the products of its Galois mode.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    false
}

impl UpgradeInfo for Tls {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/tls/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> InboundConnectionUpgrade<C> for Tls {
    type Output = (PeerId, TlsStream<BufReader<C>>);
    type Error = TlsError;
    type Future = BoxFuture<'static, Result<Self::Output, TlsError>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            let socket = BufReader::with_capacity(READ_BYTES, socket);
            let stream = TlsAcceptor::from(self.server).accept(socket).await?;
            Ok((peer(stream.get_ref().1)?, stream.into()))
        }
        .boxed()
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> OutboundConnectionUpgrade<C> for Tls {
    type Output = (PeerId, TlsStream<BufReader<C>>);
    type Error = TlsError;
    type Future = BoxFuture<'static, Result<Self::Output, TlsError>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            let socket = BufReader::with_capacity(READ_BYTES, socket);
            // A name has to be given, and is not sent.
            let nobody = ServerName::IpAddress(IpAddr::from(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
            let stream = TlsConnector::from(self.client).connect(nobody, socket).await?;
            Ok((peer(stream.get_ref().1)?, stream.into()))
        }
        .boxed()
    }
}

/// Who the other end has proved to be.
fn peer(state: &CommonState) -> Result<PeerId, TlsError> {
    match state.peer_certificates() {
        Some([certificate]) => Ok(certificate::parse(certificate)?.peer_id()),
        _ => Err(TlsError::NoCertificate),
    }
}

/// Accepts the one certificate of any libp2p peer, signed by itself and by that peer's key; whose it is, the upgrade tells.
#[derive(Debug)]
struct Verifier;

fn verify(certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
    if !others.is_empty() {
        return Err(rustls::Error::General("a peer of libp2p has exactly one certificate".into()));
    }
    // This checks both signatures, and that the certificate is valid now.
    certificate::parse(certificate)?;
    Ok(())
}

fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    certificate::parse(certificate)?.verify_signature(signed.scheme, message, signed.signature())?;
    Ok(HandshakeSignatureValid::assertion())
}

/// TLS 1.2 is not offered, so nothing of it is valid.
fn refuse_older() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(PeerMisbehaved::SelectedUnofferedCipherSuite.into())
}

/// What libp2p's certificates may be signed with, and its library verifies.
fn schemes() -> Vec<SignatureScheme> {
    vec![
        SignatureScheme::ECDSA_NISTP384_SHA384,
        SignatureScheme::ECDSA_NISTP256_SHA256,
        SignatureScheme::ED25519,
        SignatureScheme::RSA_PSS_SHA512,
        SignatureScheme::RSA_PSS_SHA384,
        SignatureScheme::RSA_PSS_SHA256,
    ]
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify(certificate, others).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        refuse_older()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        verify(certificate, others).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        refuse_older()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use futures::{AsyncReadExt as _, AsyncWriteExt as _};
    use libp2p::tls;
    use rustls::CipherSuite;
    use tokio_util::compat::TokioAsyncReadCompatExt as _;

    use super::*;

    /// Both ends of a handshake between two upgrades: who each says the other is, and the dialler's stream.
    async fn handshake<D, L>(dialler: D, listener: L) -> (Result<(PeerId, D::Output), ()>, Result<PeerId, ()>)
    where
        D: Dial,
        L: Listen,
    {
        let (near, far) = tokio::io::duplex(1 << 16);
        let served = tokio::spawn(listener.listen(far.compat()));
        let dialled = dialler.dial(near.compat()).await;
        (dialled, served.await.unwrap())
    }

    type Socket = tokio_util::compat::Compat<tokio::io::DuplexStream>;

    trait Dial {
        type Output;
        fn dial(self, socket: Socket) -> BoxFuture<'static, Result<(PeerId, Self::Output), ()>>;
    }

    trait Listen {
        /// Answers what it reads, and says who sent it.
        fn listen(self, socket: Socket) -> BoxFuture<'static, Result<PeerId, ()>>;
    }

    impl<U, S> Dial for U
    where
        U: OutboundConnectionUpgrade<Socket, Output = (PeerId, TlsStream<S>), Info = &'static str>,
        U: Send + 'static,
        U::Future: Send,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        type Output = CipherSuite;

        fn dial(self, socket: Socket) -> BoxFuture<'static, Result<(PeerId, CipherSuite), ()>> {
            async move {
                let (peer, mut stream) = self.upgrade_outbound(socket, "/tls/1.0.0").await.map_err(|_| ())?;
                stream.write_all(b"ciphertexts").await.map_err(|_| ())?;
                stream.flush().await.map_err(|_| ())?;
                let mut answer = [0; 11];
                stream.read_exact(&mut answer).await.map_err(|_| ())?;
                assert_eq!(&answer, b"ciphertexts");
                Ok((peer, stream.get_ref().1.negotiated_cipher_suite().unwrap().suite()))
            }
            .boxed()
        }
    }

    impl<U, S> Listen for U
    where
        U: InboundConnectionUpgrade<Socket, Output = (PeerId, TlsStream<S>), Info = &'static str>,
        U: Send + 'static,
        U::Future: Send,
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        fn listen(self, socket: Socket) -> BoxFuture<'static, Result<PeerId, ()>> {
            async move {
                let (peer, mut stream) = self.upgrade_inbound(socket, "/tls/1.0.0").await.map_err(|_| ())?;
                let mut read = [0; 11];
                stream.read_exact(&mut read).await.map_err(|_| ())?;
                stream.write_all(&read).await.map_err(|_| ())?;
                stream.flush().await.map_err(|_| ())?;
                Ok(peer)
            }
            .boxed()
        }
    }

    #[tokio::test]
    async fn both_ends_learn_who_the_other_is_and_use_the_fastest_cipher() {
        let (here, there) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let ids = (here.public().to_peer_id(), there.public().to_peer_id());
        let (dialled, served) = handshake(Tls::new(&here).unwrap(), Tls::new(&there).unwrap()).await;
        let fastest =
            if has_aes() { CipherSuite::TLS13_AES_128_GCM_SHA256 } else { CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 };
        assert_eq!((dialled, served), (Ok((ids.1, fastest)), Ok(ids.0)));
    }

    #[tokio::test]
    async fn peers_with_the_configuration_of_libp2p_are_understood_both_ways() {
        let (here, there) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let ids = (here.public().to_peer_id(), there.public().to_peer_id());
        let theirs = || tls::Config::new(&there).unwrap();
        let (dialled, served) = handshake(Tls::new(&here).unwrap(), theirs()).await;
        assert_eq!((dialled.unwrap().0, served), (ids.1, Ok(ids.0)));
        let (dialled, served) = handshake(theirs(), Tls::new(&here).unwrap()).await;
        assert_eq!((dialled.unwrap().0, served), (ids.0, Ok(ids.1)));
    }

    #[tokio::test]
    async fn a_certificate_that_is_nobodys_is_refused_by_either_end() {
        let here = Keypair::generate_ed25519();
        // The certificate of one peer, with the key of another's: the handshake's signature is not its.
        let forged = || {
            let mut forged = Tls::new(&here).unwrap();
            let other = Tls::new(&Keypair::generate_ed25519()).unwrap();
            let (certificate, _) = certificate::generate(&here).unwrap();
            let (_, key) = certificate::generate(&here).unwrap();
            let signing = ring::default_provider().key_provider.load_private_key(key).unwrap();
            let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], signing)));
            let mut server = (*other.server).clone();
            server.cert_resolver = resolver.clone();
            let mut client = (*other.client).clone();
            client.client_auth_cert_resolver = resolver;
            (forged.server, forged.client) = (Arc::new(server), Arc::new(client));
            forged
        };
        let honest = || Tls::new(&Keypair::generate_ed25519()).unwrap();
        let (dialled, served) = handshake(honest(), forged()).await;
        assert_eq!((dialled, served), (Err(()), Err(())));
        let (_, served) = handshake(forged(), honest()).await;
        assert_eq!(served, Err(()));
    }
}

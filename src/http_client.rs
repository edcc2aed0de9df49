//! Settings and the retry that the HTTP clients of this program share.

use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::config::ConfigBuilder;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::typestate::AgentScope;

/// Largest response head, in bytes. A longer one is an error. Heads of peers have 300 bytes, those
/// of object stores 2,000.
const MAX_HEAD: usize = 16 * 1024;

/// Base settings. No status is an error, redirects are not followed, and the client asks for
/// uncompressed bodies.
pub fn config() -> ConfigBuilder<AgentScope> {
    Agent::config_builder()
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .user_agent(concat!("peerix/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .no_delay(true)
        .max_response_header_size(MAX_HEAD)
}

/// Settings for servers with HTTPS. The client trusts the system's certificate authorities.
pub fn https_config() -> ConfigBuilder<AgentScope> {
    config().tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
}

/// Settings for a binary cache. More than `max_redirects` redirects are an error. Redirects from
/// HTTPS to HTTP are refused, because others could alter the response on the way.
pub fn cache_config(url: &str, max_redirects: u32) -> ConfigBuilder<AgentScope> {
    https_config()
        .https_only(url.starts_with("https://"))
        .max_redirects(max_redirects)
        .max_redirects_will_error(true)
}

/// Repeats a call once unless it timed out or could not connect. The peer may close a kept
/// connection at the moment of its reuse; the second call opens a new one. `call` gets its time
/// limit: `timeout`, or what remains of it.
pub fn retry_once_if_stale<T>(
    timeout: Duration,
    call: impl Fn(Duration) -> Result<T, ureq::Error>,
) -> Result<T, ureq::Error> {
    let deadline = Instant::now() + timeout;
    match call(timeout) {
        Err(e) if !matches!(e, ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() { Err(e) } else { call(left) }
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::Mutex;
    use std::{io, thread};

    #[test]
    fn second_attempt_gets_remaining_time() {
        let given = Mutex::new(Vec::new());
        let pause = Duration::from_millis(2);
        let call = |left| {
            given.lock().push(left);
            thread::sleep(pause);
            Err::<(), _>(ureq::Error::Io(io::ErrorKind::BrokenPipe.into()))
        };
        let timeout = Duration::from_secs(3600);
        retry_once_if_stale(timeout, call).unwrap_err();
        let calls = std::mem::take(&mut *given.lock());
        assert!(calls.len() == 2 && calls[0] == timeout && calls[1] <= timeout - pause);
        retry_once_if_stale(pause, call).unwrap_err();
        assert_eq!(*given.lock(), [pause], "no time is left");
    }
}

//! One tracker, as this node sees it: its calls, by blocking ureq, and whether it is of any use at the moment.
//!
//! A tracker that fails is left out of lookups until the announcing thread, which retries with growing pauses, has reached
//! it again: it costs the lookup that met the failure one deadline, and later ones nothing. Of one whose candidates
//! turn out to be dead, many of them, those that have never answered are waited for less from then on; if none of its
//! candidates was ever any good, it is left out for a while.

use super::client::twice;
use crate::nix::HashPart;
use crate::time_scale::{Interval, Timeout};
use crate::wire::filter::Filter;
use crate::wire::tracker::{
    Announce, Announced, Candidates, Identity, KEY_HEADER, MAX_CANDIDATES, MAX_OTHERS, Proof, Report, Role,
    SIGNATURE_HEADER, Statement, TIMESTAMP_HEADER, TransferBegun, TransferInit, lookup_target,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use ureq::Agent;
use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};

/// A lookup that takes longer is of no use: Nix waits, and the peers need time after it.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);
/// Who has asked too often asks again after this, until that time is over.
const TOO_OFTEN_PAUSE: Duration = Duration::from_millis(100);
/// Everything else is done off the request path.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A filter has up to 4 MiB.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// *I am leaving*, while the daemon stops.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(700);

/// An answer's body: 72 candidates with the longest IDs and names take 30 KiB.
const MAX_ANSWER: u64 = 256 * 1024;
/// Its head.
const MAX_HEAD: usize = 16 * 1024;
/// Connections kept: as many as Nix has questions.
const IDLE: usize = 25;
/// Shorter than the 30 s after which trackers close idle ones.
const IDLE_AGE: Timeout = Timeout::from_secs(25);

/// In the first moment after the start it is not known yet whether a tracker is there; lookups wait so long for its first
/// answer, as Nix remembers a wrong *not there* for an hour.
const START_GRACE: Duration = Duration::from_secs(2);

/// So many silent candidates of one lookup, beside whom few answered, say more about the tracker than about them: a site
/// without power, or a tracker that means no good.
const MANY_DEAD: usize = 8;
/// Others of its candidates are then waited for as long as so many of its own answers take, as they are likely to be as far away,
const USUAL_ANSWERS: u32 = 4;
/// but at least so long,
const LEAST_WAIT: Duration = Duration::from_millis(40);
/// and at most so long.
const LONGEST_WAIT: Duration = Duration::from_millis(400);
/// A tracker is not left out as long as one of its candidates has answered in this time.
const USEFUL_FOR: Duration = Duration::from_secs(600);
/// The first pause of one that is; it doubles.
const FIRST_PAUSE: Interval = Interval::from_secs(5);
/// The longest.
const LONGEST_PAUSE: Interval = Interval::from_secs(300);

/// A node as trackers know it.
#[derive(Debug)]
pub struct Me {
    /// Its key.
    pub identity: Identity,
    /// Its ID.
    pub peer_id: String,
    /// The port of its HTTP server.
    pub port: u16,
    /// The address to announce, if not the one that the tracker sees.
    pub addr: Option<String>,
}

/// Why a call failed.
#[derive(Debug)]
pub enum Error {
    /// No connection, no answer in time, or the connection broke.
    Unreachable(ureq::Error),
    /// A status other than 200, and what was said with it.
    Refused(u16, String),
    /// An answer that is not what it should be.
    Malformed,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreachable(e) => write!(f, "{e}"),
            Error::Refused(status, why) => write!(f, "status {status} {why}"),
            Error::Malformed => f.write_str("its answer is none of a tracker"),
        }
    }
}

impl std::error::Error for Error {}

/// One tracker; shared by all threads.
pub struct Tracker {
    url: String,
    agent: Agent,
    state: Mutex<State>,
    changed: Condvar,
    clock: Mutex<Clock>,
}

struct State {
    reached: Reached,
    started: Instant,
    /// Its own ID, once it has said it.
    id: Option<String>,
    /// Smoothed time of a lookup.
    latency: Option<Duration>,
    /// When one of its candidates answered last.
    useful: Option<Instant>,
    /// Lookups in a row whose candidates were dead, many of them.
    fruitless: u32,
    /// When that was last counted: lookups that were under way together count once.
    counted: Option<Instant>,
    paused_until: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reached {
    NotYet,
    Yes,
    No,
}

/// Timestamps of statements: each later than the last, by the tracker's clock if ours is wrong.
#[derive(Default)]
struct Clock {
    /// Milliseconds to add to our clock.
    offset: i64,
    last: u64,
}

#[derive(Deserialize, Default)]
struct Refusal {
    error: Option<String>,
    now: Option<u64>,
}

impl Tracker {
    /// The tracker at that URL, which ends without a slash.
    pub fn new(url: String, now: Instant) -> Self {
        let agent = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("peerix/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .no_delay(true)
            .timeout_global(Some(CALL_TIMEOUT))
            .max_response_header_size(MAX_HEAD)
            .max_idle_connections(IDLE)
            .max_idle_connections_per_host(IDLE)
            .max_idle_age(IDLE_AGE.get())
            .build()
            .into();
        let state = State {
            reached: Reached::NotYet,
            started: now,
            id: None,
            latency: None,
            useful: None,
            fruitless: 0,
            counted: None,
            paused_until: None,
        };
        Tracker { url, agent, state: Mutex::new(state), changed: Condvar::new(), clock: Mutex::default() }
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The ID it gave itself, if it has.
    pub fn id(&self) -> Option<String> {
        self.lock().id.clone()
    }

    /// Whether a lookup should ask it. Waits, right after the start, until it is known whether the tracker is there.
    pub fn is_of_use(&self) -> bool {
        let state = self.lock();
        let grace = (state.started + START_GRACE).saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, grace, |state| state.reached == Reached::NotYet);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let now = Instant::now();
        if state.reached != Reached::Yes || state.paused_until.is_some_and(|until| until > now) {
            return false;
        }
        // After a pause one lookup tries, and the others go on without.
        if state.paused_until.is_some() {
            state.paused_until = Some(now + FIRST_PAUSE.get());
        }
        true
    }

    /// How long to wait for candidates that have never answered; `None` for no such limit.
    pub fn patience(&self) -> Option<Duration> {
        let state = self.lock();
        let usual = state.latency.unwrap_or_default() * USUAL_ANSWERS;
        (state.fruitless > 0).then(|| usual.clamp(LEAST_WAIT, LONGEST_WAIT))
    }

    /// Says what came of the candidates of a lookup that began at `began`: how many showed a sign of life, and how many none.
    pub fn proved(&self, alive: usize, silent: usize, began: Instant, now: Instant) {
        let mut state = self.lock();
        if alive > 0 {
            state.useful = Some(now);
            state.paused_until = None;
        }
        if silent < MANY_DEAD || alive * 4 >= silent {
            if alive > 0 {
                state.fruitless = 0;
            }
            return;
        }
        // Lookups that were under way together count once.
        if state.counted.is_some_and(|counted| counted >= began) {
            return;
        }
        if state.fruitless == 0 {
            log::warn!("tracker {}: of the peers that it names, {silent} are silent and {alive} are not", self.url);
        }
        state.fruitless += 1;
        state.counted = Some(now);
        let is_useful = state.useful.is_some_and(|at| now.saturating_duration_since(at) < USEFUL_FOR);
        if state.fruitless > 1 && !is_useful {
            let longest = LONGEST_PAUSE.get();
            let pause = FIRST_PAUSE.get().saturating_mul(1 << (state.fruitless - 2).min(10)).min(longest);
            log::debug!("tracker {}: left out for {} s", self.url, pause.as_secs());
            state.paused_until = Some(now + pause);
        }
    }

    /// The peers that may have a path, without `me`. A failure leaves the tracker out until it is reached again.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn lookup(&self, hash_part: &HashPart, me: &Me) -> Result<Candidates, Error> {
        let url = format!("{}{}", self.url, lookup_target(hash_part));
        let call = || self.agent.get(&url).config().timeout_global(Some(LOOKUP_TIMEOUT)).build().call();
        let first = Instant::now();
        let (began, answer) = loop {
            let began = Instant::now();
            let answer = twice(call).map_err(Error::Unreachable).and_then(read::<Candidates>);
            // A site may ask for more than it is allowed to: then a little later it may. A miss, Nix would remember for an hour.
            if !is_too_often(&answer) || first.elapsed() + TOO_OFTEN_PAUSE > LOOKUP_TIMEOUT {
                break (began, answer);
            }
            thread::sleep(TOO_OFTEN_PAUSE);
        };
        match answer {
            Ok(mut found) => {
                let (took, mut state) = (began.elapsed(), self.lock());
                state.latency = Some(state.latency.map_or(took, |old| (old * 7 + took) / 8));
                drop(state);
                found.candidates.truncate(MAX_CANDIDATES);
                found.others.truncate(MAX_OTHERS);
                found.candidates.retain(|candidate| candidate.peer_id != me.peer_id);
                found.others.retain(|candidate| candidate.peer_id != me.peer_id);
                Ok(found)
            }
            Err(e) => {
                if !is_too_often(&Err::<(), _>(&e)) {
                    self.failed(&e);
                }
                Err(e)
            }
        }
    }

    /// Says that this node is here. Also finds out whether the tracker is.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn announce(&self, me: &Me) -> Result<Announced, Error> {
        let addr = me.addr.as_deref().unwrap_or_default();
        let statement = Statement::Announce { peer_id: &me.peer_id, port: me.port, addr };
        let answer: Result<Announced, Error> = self.signed(me, &statement, |proof| {
            let announce =
                Announce { peer_id: Some(me.peer_id.clone()), port: Some(me.port), addr: me.addr.clone(), proof };
            self.post("/announce", &announce)
        });
        match &answer {
            Ok(announced) => self.reached(announced.tracker.clone()),
            // It is there, and can be asked, whatever it thinks of us.
            Err(Error::Refused(400..500, _)) => self.reached(None),
            Err(e) => self.failed(e),
        }
        answer
    }

    /// Says that this node leaves.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn leave(&self, me: &Me) -> Result<(), Error> {
        self.signed(me, &Statement::Leave { peer_id: &me.peer_id }, |proof| {
            let body = Announce { peer_id: Some(me.peer_id.clone()), proof, ..Announce::default() };
            self.agent
                .delete(format!("{}/announce", self.url))
                .header("Content-Type", "application/json")
                .config()
                .timeout_global(Some(LEAVE_TIMEOUT))
                .build()
                .force_send_body()
                .send(json(&body))
        })
        .map(|_: serde::de::IgnoredAny| ())
    }

    /// Publishes what this node would share. Gives the timestamp by which the tracker knows it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn put_filter(&self, me: &Me, filter: &Filter) -> Result<u64, Error> {
        let digest = ring::digest::digest(&ring::digest::SHA256, filter.as_bytes());
        let statement = Statement::Filter { peer_id: &me.peer_id, digest: digest.as_ref() };
        let id = percent_encoding::utf8_percent_encode(&me.peer_id, percent_encoding::NON_ALPHANUMERIC);
        let url = format!("{}/filter/{id}", self.url);
        let mut sent = 0;
        let answer: Result<serde::de::IgnoredAny, Error> = self.signed(me, &statement, |proof| {
            sent = proof.timestamp.unwrap_or_default();
            self.agent
                .put(&url)
                .header(KEY_HEADER, proof.public_key.unwrap_or_default())
                .header(TIMESTAMP_HEADER, sent.to_string())
                .header(SIGNATURE_HEADER, proof.signature.unwrap_or_default())
                .config()
                .timeout_global(Some(UPLOAD_TIMEOUT))
                .build()
                .send(filter.as_bytes())
        });
        answer.map(|_| sent)
    }

    /// Begins transfers from `sender_id` to this node; gives the first ID and how many there are.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn begin_transfers(&self, me: &Me, sender_id: &str, count: u32) -> Result<(u64, u32), Error> {
        let init = TransferInit {
            sender_id: Some(sender_id.to_owned()),
            receiver_id: Some(me.peer_id.clone()),
            count: Some(count),
        };
        let begun: TransferBegun = self.post("/transfer/init", &init).map_err(Error::Unreachable).and_then(read)?;
        // A tracker of the original begins one, whatever it is asked.
        Ok((begun.transfer_id, begun.count.unwrap_or(1).min(count)))
    }

    /// Reports what this node sent or received.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn report(&self, me: &Me, transfer_id: u64, role: Role, bytes: u64) -> Result<(), Error> {
        let statement = Statement::Report { transfer_id, peer_id: &me.peer_id, role: role.as_str(), bytes };
        self.signed(me, &statement, |proof| {
            let report = Report {
                transfer_id: Some(transfer_id),
                peer_id: Some(me.peer_id.clone()),
                role: Some(role.as_str().to_owned()),
                bytes: Some(bytes),
                proof,
            };
            self.post("/report", &report)
        })
        .map(|_: serde::de::IgnoredAny| ())
    }

    fn post(&self, path: &str, body: &impl serde::Serialize) -> Result<Response<ureq::Body>, ureq::Error> {
        let request = || self.agent.post(format!("{}{path}", self.url)).header("Content-Type", "application/json");
        request().send(json(body))
    }

    /// Signs and sends a statement; once more, if the tracker's clock turns out to be another.
    fn signed<T: DeserializeOwned>(
        &self,
        me: &Me,
        statement: &Statement<'_>,
        mut send: impl FnMut(Proof) -> Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<T, Error> {
        let mut send = || send(me.identity.sign(statement, self.timestamp())).map_err(Error::Unreachable);
        let response = send()?;
        if response.status() != 403 {
            return read(response);
        }
        let refusal: Refusal = body(response).unwrap_or_default();
        match refusal.now {
            Some(now) => {
                self.set_clock(now);
                read(send()?)
            }
            None => Err(Error::Refused(403, refusal.error.unwrap_or_default())),
        }
    }

    fn timestamp(&self) -> u64 {
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.last = our_clock().saturating_add_signed(clock.offset).max(clock.last.saturating_add(1));
        clock.last
    }

    fn set_clock(&self, now: u64) {
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock.offset = i64::try_from(i128::from(now) - i128::from(our_clock())).unwrap_or(0);
        clock.last = 0;
        log::debug!("tracker {}: its clock is {} ms ahead of ours", self.url, clock.offset);
    }

    fn reached(&self, id: Option<String>) {
        let mut state = self.lock();
        if state.reached != Reached::Yes {
            log::info!("tracker {}: reached", self.url);
        }
        state.reached = Reached::Yes;
        state.id = id.or(state.id.take());
        self.changed.notify_all();
    }

    fn failed(&self, why: &Error) {
        let mut state = self.lock();
        if state.reached == Reached::No {
            log::debug!("tracker {}: {why}", self.url);
        } else {
            log::warn!("tracker {}: {why}; left out until it is reached again", self.url);
        }
        state.reached = Reached::No;
        self.changed.notify_all();
    }

    /// Whether it is there; `None` while its first answer is awaited.
    pub fn reached_if_known(&self) -> Option<bool> {
        match self.lock().reached {
            Reached::NotYet => None,
            Reached::Yes => Some(true),
            Reached::No => Some(false),
        }
    }

    /// Whether it is there, as far as is known.
    pub fn is_reached(&self) -> bool {
        self.lock().reached == Reached::Yes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_too_often<T, E: std::borrow::Borrow<Error>>(answer: &Result<T, E>) -> bool {
    matches!(answer, Err(e) if matches!(e.borrow(), Error::Refused(429, _)))
}

/// Milliseconds since 1970, by a clock that may be wrong.
fn our_clock() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn json(body: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("text and numbers are JSON")
}

fn body<T: DeserializeOwned>(response: Response<ureq::Body>) -> Option<T> {
    let bytes = response.into_body().into_with_config().limit(MAX_ANSWER).read_to_vec().ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn read<T: DeserializeOwned>(response: Response<ureq::Body>) -> Result<T, Error> {
    match response.status().as_u16() {
        200 => body(response).ok_or(Error::Malformed),
        status => Err(Error::Refused(status, body::<Refusal>(response).and_then(|r| r.error).unwrap_or_default())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(now: Instant) -> Tracker {
        Tracker::new("http://127.0.0.1:1".into(), now)
    }

    #[test]
    fn one_that_fails_is_left_out_until_it_is_reached() {
        let tracker = tracker(Instant::now());
        tracker.failed(&Error::Malformed);
        assert!(!tracker.is_of_use());
        tracker.reached(Some("0123456789abcdef".into()));
        assert!(tracker.is_of_use());
        assert_eq!(tracker.id().as_deref(), Some("0123456789abcdef"));
        // A later answer without an ID does not take it away.
        tracker.reached(None);
        assert!(tracker.id().is_some());
    }

    #[test]
    fn one_that_names_none_but_the_dead_is_left_out() {
        let now = Instant::now();
        let tracker = tracker(now);
        tracker.reached(None);
        tracker.proved(0, MANY_DEAD - 1, now, now);
        assert_eq!(tracker.patience(), None);
        let later = now + Duration::from_secs(2);
        for _ in 0..25 {
            tracker.proved(0, MANY_DEAD, now, later);
        }
        // Once may be an accident: a path of which only the dead were thought to have it.
        assert!(tracker.is_of_use());
        assert_eq!(tracker.patience(), Some(LEAST_WAIT));
        let again = later + LEAST_WAIT;
        tracker.proved(0, MANY_DEAD, later + Duration::from_millis(1), again);
        assert_eq!(tracker.lock().paused_until, Some(again + FIRST_PAUSE.get()));
        assert!(!tracker.is_of_use());
        tracker.lock().paused_until = Some(now);
        assert!(tracker.is_of_use(), "one tries again");
        assert!(!tracker.is_of_use(), "the others do not wait for it");
        tracker.proved(0, MANY_DEAD, again + FIRST_PAUSE.get(), again + FIRST_PAUSE.get());
        assert_eq!(tracker.lock().paused_until, Some(again + FIRST_PAUSE.get() * 3));
        tracker.proved(1, 0, again, again);
        assert!(tracker.is_of_use() && tracker.is_of_use());
        assert_eq!(tracker.patience(), None);
    }

    /// Eight machines without power used to hide all others of the tracker.
    #[test]
    fn one_that_was_useful_is_not_left_out() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let tracker = tracker(now);
        tracker.reached(None);
        tracker.proved(1, 3, now, now);
        for i in 1..100 {
            tracker.proved(0, MANY_DEAD, now + second * i, now + second * i);
            assert!(tracker.is_of_use() && tracker.is_of_use());
        }
        assert!(tracker.patience().is_some());
        // A few that answer do not speak for as many that do not.
        tracker.proved(1, 2 * MANY_DEAD, now + second * 101, now + second * 101);
        assert!(tracker.patience().is_some());
        tracker.proved(4, 2 * MANY_DEAD, now + second * 102, now + second * 102);
        assert!(tracker.patience().is_none());
        for i in 800..802 {
            tracker.proved(0, MANY_DEAD, now + second * i, now + second * i);
        }
        assert!(!tracker.is_of_use());
    }

    #[test]
    fn those_never_heard_are_waited_for_as_far_as_the_tracker_is_away() {
        let now = Instant::now();
        let tracker = tracker(now);
        tracker.proved(0, MANY_DEAD, now, now);
        for (millis, wait) in [(1, 40), (30, 120), (500, 400)] {
            tracker.lock().latency = Some(Duration::from_millis(millis));
            assert_eq!(tracker.patience(), Some(Duration::from_millis(wait)));
        }
    }

    /// The tracker used to be taken for dead, and what its peers had for missing.
    #[test]
    fn one_that_is_asked_too_often_is_asked_again() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = std::io::BufRead::lines(std::io::BufReader::new(&stream)).map_while(Result::ok);
            let found = r#"{"candidates":[{"peer_id":"b","addr":"10.0.0.1","port":1,"score":0.0}],"others":[]}"#;
            for (status, body) in [(429, "{}"), (429, "{}"), (200, found)] {
                assert!(lines.any(|line| line.is_empty()), "a request");
                let answer = format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                std::io::Write::write_all(&mut &stream, answer.as_bytes()).unwrap();
            }
        });
        let tracker = Tracker::new(url, Instant::now());
        tracker.reached(None);
        let identity = Identity::from_seed(&[1; 32]);
        let me = Me { identity, peer_id: "a".into(), port: 1, addr: None };
        let found = tracker.lookup(&HashPart::parse(&[b'0'; 32]).unwrap(), &me).unwrap();
        assert_eq!(found.candidates.len(), 1);
        assert!(tracker.is_reached());
        server.join().unwrap();
    }

    #[test]
    fn timestamps_never_go_back() {
        let tracker = tracker(Instant::now());
        let stamps: Vec<u64> = (0..100).map(|_| tracker.timestamp()).collect();
        assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]));
        for ahead in [-3_600_000, 3_600_000] {
            let now = our_clock().saturating_add_signed(ahead);
            tracker.set_clock(now);
            assert!(tracker.timestamp().abs_diff(now) < 60_000);
        }
        // A tracker that names the end of time gets what it wants, and no overflow.
        tracker.set_clock(u64::MAX);
        tracker.timestamp();
    }
}

//! Queries in flight: request IDs, who was asked, who is still waited for. No I/O; time is passed in.

use super::Holder;
use crate::nix::HashPart;
use crossbeam_channel::Sender;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Queries in flight at once. Each belongs to a connection thread that waits for it, of which there are 1,024, or
/// is one that found its path and lingers for other holders.
const MAX_QUERIES: usize = 4096;

/// A query is sent so many times at most: at once, and then at ever longer steps while somebody is waited for.
const MAX_SENDS: u32 = 5;

/// Once somebody has the path, the others have so long to say that they do too.
const LINGER: Duration = Duration::from_millis(200);

/// Ended queries whose late answers are still understood: a second of Nix's questions.
const MAX_OVER: usize = 1024;

/// What an asker and its query tell each other beside the holders.
#[derive(Debug, Default)]
pub struct Tally {
    /// The asker needs no more.
    pub content: AtomicBool,
    /// It was sent at all.
    was_sent: AtomicBool,
    asked: AtomicU32,
    answered: AtomicU32,
}

impl Tally {
    /// How many were asked by name, and how many of them did not answer: complete when the channel of holders has ended.
    /// `None` if nobody was asked, because there were too many queries.
    pub fn asked_and_silent(&self) -> Option<(u32, u32)> {
        let asked = self.asked.load(Ordering::Relaxed);
        let silent = asked.saturating_sub(self.answered.load(Ordering::Relaxed));
        self.was_sent.load(Ordering::Relaxed).then_some((asked, silent))
    }
}

/// One query.
pub struct Query {
    /// What is looked for.
    pub hash_part: HashPart,
    /// When it was first sent.
    pub sent: Instant,
    asked: Vec<Asked>,
    /// Until then anybody may say *have*, asked by name or by broadcast.
    open_until: Option<Instant>,
    sends: u32,
    step: Duration,
    next_send: Option<Instant>,
    holders: Sender<Holder>,
    tally: Arc<Tally>,
    /// Whose holders were passed on: one address has one server, however many it claims.
    heard_from: Vec<IpAddr>,
}

struct Asked {
    peer: SocketAddr,
    due: Option<Instant>,
    answered: bool,
}

/// What to do for a query now.
#[derive(Debug, PartialEq, Eq)]
pub enum Due {
    /// Send it again to those who are waited for, and by broadcast too if `broadcast`.
    Repeat {
        /// The query.
        id: u32,
        /// Its hash part.
        hash_part: HashPart,
        /// Who has not answered.
        to: Vec<SocketAddr>,
        /// Whether this is the one repeat that is also broadcast.
        broadcast: bool,
    },
    /// It is over. These were waited for in vain since `sent`.
    Over {
        /// When the query was first sent.
        sent: Instant,
        /// Who did not answer in time.
        unanswered: Vec<SocketAddr>,
        /// Whether anybody answered at all.
        answered: bool,
    },
}

impl Query {
    /// A query that is sent now. `first_step` is the time to its first repeat. Whoever holds the other end of
    /// `holders` learns of holders, and of the end by the channel's end.
    pub fn new(
        hash_part: HashPart,
        asked: impl Iterator<Item = (SocketAddr, Option<Duration>)>,
        open_for: Option<Duration>,
        first_step: Duration,
        holders: Sender<Holder>,
        tally: Arc<Tally>,
        now: Instant,
    ) -> Self {
        let asked = asked.map(|(peer, wait)| Asked { peer, due: wait.map(|wait| now + wait), answered: false });
        Query {
            hash_part,
            sent: now,
            asked: asked.collect(),
            open_until: open_for.map(|wait| now + wait),
            sends: 1,
            step: first_step,
            next_send: Some(now + first_step),
            holders,
            tally,
            heard_from: Vec::new(),
        }
    }

    /// Passes a holder on. Whether it really has the path is for the asker to find out.
    fn found(&mut self, holder: Holder) {
        if self.heard_from.contains(&holder.http.ip()) {
            return;
        }
        self.heard_from.push(holder.http.ip());
        // Full: enough holders are known. Closed: nobody listens any more.
        let _ = self.holders.try_send(holder);
    }

    /// The asker got what it wanted: nobody is asked again, and the others get a little more time, as alternates.
    fn settle(&mut self, now: Instant) {
        self.next_send = None;
        let latest = now + LINGER;
        let dues = self.asked.iter_mut().filter_map(|asked| asked.due.as_mut());
        dues.chain(self.open_until.as_mut()).for_each(|until| *until = latest.min(*until));
    }

    fn waits_for(&self, asked: &Asked, now: Instant) -> bool {
        !asked.answered && asked.due.is_some_and(|due| due > now)
    }

    fn ends(&self, now: Instant) -> Option<Instant> {
        let due = self.asked.iter().filter(|a| self.waits_for(a, now)).filter_map(|a| a.due);
        due.chain(self.open_until.filter(|&until| until > now)).max()
    }

    /// When this query is over or to be repeated.
    fn next_due(&self, now: Instant) -> Instant {
        let ends = self.ends(now).unwrap_or(now);
        self.next_send.map_or(ends, |send| send.min(ends))
    }
}

/// All queries in flight.
pub struct Queries {
    queries: HashMap<u32, Query>,
    next_id: u32,
    /// Nothing is due before; `None` when there is no query.
    next_due: Option<Instant>,
    /// The last ones that ended with somebody silent, and when they were sent.
    over: VecDeque<(u32, Instant)>,
}

/// What an answer told beside its content.
#[derive(Debug, PartialEq, Eq)]
pub struct Answered {
    /// Set where the query was sent only once, so that it is clear which copy was answered.
    pub round_trip: Option<Duration>,
}

impl Queries {
    /// IDs count up from `first_id`, which should be random.
    pub fn new(first_id: u32) -> Self {
        Queries { queries: HashMap::new(), next_id: first_id, next_due: None, over: VecDeque::new() }
    }

    /// Takes a query and gives its ID; `None` when there are too many.
    pub fn insert(&mut self, query: Query, now: Instant) -> Option<u32> {
        if self.queries.len() >= MAX_QUERIES {
            return None;
        }
        while self.queries.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        query.tally.asked.store(u32::try_from(query.asked.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        query.tally.was_sent.store(true, Ordering::Relaxed);
        let due = query.next_due(now);
        self.next_due = Some(self.next_due.map_or(due, |next| next.min(due)));
        self.queries.insert(id, query);
        Some(id)
    }

    /// An answer to query `id` came from `from`. `neighbour`: it is in a subnet that queries are broadcast to.
    /// `None`: there is no such query any more, or it did not go there.
    pub fn answered(
        &mut self,
        id: u32,
        from: SocketAddr,
        neighbour: bool,
        holder: Option<Holder>,
        now: Instant,
    ) -> Option<Answered> {
        let query = self.queries.get_mut(&id)?;
        let asked = query.asked.iter_mut().find(|a| a.peer == from);
        if asked.is_none() && !neighbour {
            return None;
        }
        let once = query.sends == 1 && asked.as_ref().is_some_and(|a| !a.answered);
        if let Some(asked) = asked
            && !std::mem::replace(&mut asked.answered, true)
        {
            query.tally.answered.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(holder) = holder {
            query.found(holder);
        }
        let round_trip = once.then(|| now.saturating_duration_since(query.sent));
        if query.ends(now).is_none() {
            let sent = query.sent;
            let is_late = query.asked.iter().any(|a| !a.answered);
            self.queries.remove(&id);
            if is_late {
                self.remember(id, sent);
            }
        } else {
            let due = query.next_due(now);
            self.next_due = self.next_due.map(|next| next.min(due));
        }
        Some(Answered { round_trip })
    }

    /// The next query that has to be repeated or is over. Call until `None`.
    pub fn due(&mut self, now: Instant) -> Option<Due> {
        if self.next_due.is_none_or(|next| next > now) {
            return None;
        }
        let Some((&id, query)) = self.queries.iter_mut().find(|(_, q)| q.next_due(now) <= now) else {
            self.next_due = self.queries.values().map(|q| q.next_due(now)).min();
            return None;
        };
        if query.ends(now).is_none() {
            let query = self.queries.remove(&id)?;
            self.remember(id, query.sent);
            let unanswered = query.asked.iter().filter(|a| !a.answered && a.due.is_some()).map(|a| a.peer).collect();
            let answered = query.asked.iter().any(|a| a.answered);
            return Some(Due::Over { sent: query.sent, unanswered, answered });
        }
        if query.tally.content.load(Ordering::Relaxed) {
            query.settle(now);
            return self.due(now);
        }
        query.sends += 1;
        query.step *= 2;
        query.next_send = (query.sends < MAX_SENDS).then(|| now + query.step);
        let to = query.asked.iter().filter(|a| query.waits_for(a, now)).map(|a| a.peer).collect();
        Some(Due::Repeat { id, hash_part: query.hash_part, to, broadcast: query.sends == 2 })
    }

    fn remember(&mut self, id: u32, sent: Instant) {
        if self.over.len() >= MAX_OVER {
            self.over.pop_front();
        }
        self.over.push_back((id, sent));
    }

    /// How long ago a query that is over was sent: what a late answer tells of its sender's round trip.
    pub fn late(&self, id: u32, now: Instant) -> Option<Duration> {
        let (_, sent) = self.over.iter().find(|(over, _)| *over == id)?;
        Some(now.saturating_duration_since(*sent))
    }

    /// When [`Queries::due`] may have something next.
    pub fn next_due(&self) -> Option<Instant> {
        self.next_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, TryRecvError, bounded};

    const MS: Duration = Duration::from_millis(1);

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 12304))
    }

    fn hash_part() -> HashPart {
        HashPart::parse(b"7h7qgvs4kgzsn8a6rb273saxyqh4jxlz").unwrap()
    }

    fn holder(last: u8) -> Option<Holder> {
        Some(Holder { http: address(last), url_path: "local/x.narinfo".into() })
    }

    /// A query to two peers that are due in 200 ms, first repeated after 16 ms.
    fn query(now: Instant, open_for: Option<Duration>) -> (Query, Receiver<Holder>) {
        let (sender, receiver) = bounded(4);
        let asked = [(address(1), Some(200 * MS)), (address(2), Some(200 * MS)), (address(3), None)];
        (Query::new(hash_part(), asked.into_iter(), open_for, 16 * MS, sender, Arc::default(), now), receiver)
    }

    #[test]
    fn ends_as_soon_as_all_who_are_waited_for_answered() {
        let (now, mut queries) = (Instant::now(), Queries::new(u32::MAX));
        let (query, holders) = query(now, None);
        let id = queries.insert(query, now).unwrap();
        assert_eq!(id, u32::MAX);
        let answer = queries.answered(id, address(1), true, None, now + MS);
        assert_eq!(answer, Some(Answered { round_trip: Some(MS) }));
        assert_eq!(holders.try_recv(), Err(TryRecvError::Empty));
        queries.answered(id, address(2), true, None, now + MS).unwrap();
        assert_eq!(holders.try_recv(), Err(TryRecvError::Disconnected));
        assert_eq!(queries.answered(id, address(2), true, None, now + MS), None, "a late answer is nothing");
    }

    #[test]
    fn stays_open_for_the_unknown() {
        let (now, mut queries) = (Instant::now(), Queries::new(0));
        let (query, holders) = query(now, Some(50 * MS));
        let id = queries.insert(query, now).unwrap();
        for peer in [1, 2] {
            queries.answered(id, address(peer), true, None, now + MS).unwrap();
        }
        assert_eq!(holders.try_recv(), Err(TryRecvError::Empty));
        // A neighbour that was not asked by name, and a stranger.
        assert!(queries.answered(id, address(9), false, holder(9), now + MS).is_none());
        assert_eq!(queries.answered(id, address(8), true, holder(8), now + MS), Some(Answered { round_trip: None }));
        assert_eq!(holders.try_recv().unwrap().http, address(8));
        while queries.due(now + 50 * MS).is_some() {}
        assert_eq!(holders.try_recv(), Err(TryRecvError::Disconnected));
    }

    /// One neighbour could fill the channel with servers of its own, so that nobody else's answer found room.
    #[test]
    fn one_address_is_one_holder() {
        let (now, mut queries) = (Instant::now(), Queries::new(0));
        let (query, holders) = query(now, None);
        let id = queries.insert(query, now).unwrap();
        for port in 1..100 {
            let claim = Holder { http: SocketAddr::from(([10, 0, 0, 1], port)), url_path: "local/x.narinfo".into() };
            queries.answered(id, address(1), true, Some(claim), now);
        }
        queries.answered(id, address(2), true, holder(2), now);
        assert_eq!(holders.try_iter().map(|h| h.http.ip()).collect::<Vec<_>>(), [address(1).ip(), address(2).ip()]);
    }

    /// The end used to be seen only when the slow peer would have been due, though it had answered.
    #[test]
    fn an_answer_can_make_the_end_come_earlier() {
        let (now, mut queries) = (Instant::now(), Queries::new(0));
        let (sender, holders) = bounded(4);
        let asked = [(address(1), Some(1000 * MS)), (address(2), Some(200 * MS))];
        let query = Query::new(hash_part(), asked.into_iter(), None, 3000 * MS, sender, Arc::default(), now);
        let id = queries.insert(query, now).unwrap();
        assert_eq!(queries.due(now + MS), None);
        queries.answered(id, address(1), true, None, now + 2 * MS).unwrap();
        assert!(queries.next_due().unwrap() <= now + 200 * MS);
        assert!(matches!(queries.due(now + 200 * MS), Some(Due::Over { .. })));
        assert_eq!(holders.try_recv(), Err(TryRecvError::Disconnected));
        assert_eq!(queries.late(id, now + 300 * MS), Some(300 * MS));
        assert_eq!(queries.late(id + 1, now), None);
    }

    #[test]
    fn repeats_go_to_those_who_have_not_answered_and_grow_apart() {
        let (now, mut queries) = (Instant::now(), Queries::new(7));
        let (query, _holders) = query(now, None);
        queries.insert(query, now).unwrap();
        queries.answered(7, address(2), true, None, now + MS).unwrap();
        let mut repeats = Vec::new();
        for ms in 1..=200u32 {
            match queries.due(now + ms * MS) {
                Some(Due::Repeat { id: 7, to, broadcast, .. }) => {
                    assert_eq!(to, [address(1)]);
                    repeats.push((ms, broadcast));
                }
                Some(Due::Over { unanswered, answered: true, .. }) => {
                    assert_eq!((unanswered, ms), (vec![address(1)], 200));
                }
                None => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(repeats, [(16, true), (48, false), (112, false)]);
        // After a repeat nobody knows which copy was answered.
        assert_eq!(queries.next_due(), Some(now + 200 * MS));
    }

    #[test]
    fn nothing_is_repeated_once_the_asker_is_content() {
        let (now, mut queries) = (Instant::now(), Queries::new(7));
        let (query, _holders) = query(now, None);
        let tally = query.tally.clone();
        queries.insert(query, now).unwrap();
        queries.answered(7, address(1), true, holder(1), now + MS).unwrap();
        tally.content.store(true, Ordering::Relaxed);
        for ms in 2..200u32 {
            assert_eq!(queries.due(now + ms * MS), None);
        }
    }

    /// A false *have* used to end the repeats, so that a holder whose answer was lost was not asked again.
    #[test]
    fn a_claim_alone_stops_no_repeat() {
        let (now, mut queries) = (Instant::now(), Queries::new(7));
        let (query, _holders) = query(now, None);
        queries.insert(query, now).unwrap();
        queries.answered(7, address(1), true, holder(1), now + MS).unwrap();
        let due = queries.due(now + 16 * MS);
        assert!(matches!(due, Some(Due::Repeat { to, .. }) if to == [address(2)]));
    }

    /// A peer that is not waited for, because it was silent once, used to stay so however it answered.
    #[test]
    fn late_answers_to_a_query_that_ended_early_are_understood() {
        let (now, mut queries) = (Instant::now(), Queries::new(7));
        let (query, _holders) = query(now, None);
        queries.insert(query, now).unwrap();
        queries.answered(7, address(1), true, None, now + MS).unwrap();
        queries.answered(7, address(2), true, None, now + MS).unwrap();
        assert_eq!(queries.answered(7, address(3), true, holder(3), now + 3 * MS), None);
        assert_eq!(queries.late(7, now + 3 * MS), Some(3 * MS));
    }

    #[test]
    fn with_nobody_to_wait_for_it_is_over_at_once() {
        let (now, mut queries) = (Instant::now(), Queries::new(7));
        let (sender, holders) = bounded(4);
        let query =
            Query::new(hash_part(), [(address(1), None)].into_iter(), None, 16 * MS, sender, Arc::default(), now);
        queries.insert(query, now).unwrap();
        assert!(matches!(queries.due(now), Some(Due::Over { answered: false, .. })));
        assert_eq!(holders.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn the_number_in_flight_is_bounded() {
        let (now, mut queries) = (Instant::now(), Queries::new(0));
        for _ in 0..MAX_QUERIES {
            assert!(queries.insert(query(now, None).0, now).is_some());
        }
        assert!(queries.insert(query(now, None).0, now).is_none());
    }
}

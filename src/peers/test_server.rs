//! Server for unit tests, which gives prepared answers to HTTP requests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::thread::{self, JoinHandle};

/// A complete answer.
pub fn answer(head: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into()
}

/// Starts a server that sends these answers, each on a connection of its own if `closes`, and then
/// refuses connections. Returns its address, and its thread, which returns the first line and the
/// body of each request.
pub fn serve(
    answers: Vec<Vec<u8>>,
    closes: bool,
) -> (SocketAddr, JoinHandle<Vec<(String, String)>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let mut connection = None;
        let answer = |answer: Vec<u8>| {
            let reader =
                connection.get_or_insert_with(|| BufReader::new(listener.accept().unwrap().0));
            let head: Vec<String> = reader
                .by_ref()
                .lines()
                .map(Result::unwrap)
                .take_while(|line| !line.is_empty())
                .collect();
            let length = head.iter().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().unwrap())
            });
            let mut body = vec![0; length.unwrap_or(0)];
            reader.read_exact(&mut body).unwrap();
            // The client may have enough.
            let _ = reader.get_mut().write_all(&answer);
            if closes {
                connection = None;
            }
            (head[0].clone(), String::from_utf8(body).unwrap())
        };
        answers.into_iter().map(answer).collect()
    });
    (address, server)
}

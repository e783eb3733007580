//! Answers Prometheus over TCP: `GET /metrics`, HTTP/1.0, one request a connection. Bounded in size, time and number.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::live::Live;

/// Longest request head, in bytes.
const HEAD_MAX: usize = 8 << 10;
/// A request must be complete after this time, and its answer be taken.
const TIME: Duration = Duration::from_secs(5);
/// After an accept(2) that failed, the next is tried after this time.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens at `at` for as long as the process lives; gives the address, whose port the system chose if that was 0.
///
/// # Errors
/// The address cannot be used.
pub fn start(at: SocketAddr, live: Arc<Live>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(at)?;
    let at = listener.local_addr()?;
    // One after the other: a scraper comes every few seconds, and nobody can take more than one thread.
    std::thread::Builder::new().name("metrics".into()).spawn(move || {
        for stream in listener.incoming() {
            let served = stream.and_then(|s| serve(&s, || live.metrics()));
            if let Err(e) = served {
                tracing::debug!("metrics: {e}");
                std::thread::sleep(PAUSE);
            }
        }
    })?;
    Ok(at)
}

fn serve(mut stream: &TcpStream, metrics: impl FnOnce() -> String) -> io::Result<()> {
    let head = head(stream)?;
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", metrics()),
        ("GET" | "HEAD", _) => ("404 Not Found", "fsys-mount: see /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "fsys-mount: GET /metrics\n".to_owned()),
    };
    let (length, body) = (body.len(), if method == "HEAD" { "" } else { &body });
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    stream.set_write_timeout(Some(TIME))?;
    write!(stream, "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}")
}

/// The request line; the rest of the head is read, since a close with unread bytes would reset the connection.
fn head(mut stream: &TcpStream) -> io::Result<String> {
    let end = Instant::now() + TIME;
    let (mut head, mut part) = (Vec::new(), [0; 1024]);
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > HEAD_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the request is too slow or too large"));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => break,
            n => head.extend_from_slice(&part[..n]),
        }
    }
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    Ok(String::from_utf8_lossy(line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fake;
    use super::*;
    use crate::config::Config;
    use crate::config::options::Options;

    fn ask(at: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(request).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn answers_what_is_asked_and_survives_nonsense() {
        let live = Live::new(Arc::new(Fake), Options::default(), Config::default());
        let at = start("127.0.0.1:0".parse().unwrap(), Arc::new(live)).unwrap();
        let answer = ask(at, b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200 OK") && head.contains("version=0.0.4"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}", body.len())) && body.contains("fsys_info{"), "{head}");
        assert!(ask(at, b"HEAD /metrics HTTP/1.0\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(ask(at, b"GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 404"));
        assert!(ask(at, b"POST /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 405"));
        assert!(ask(at, b"\xff\r\n\r\n").starts_with("HTTP/1.0 405"));
        // Too large: given up without an answer, and the next one is served.
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(&vec![b'x'; HEAD_MAX + 2048]).unwrap_or_default();
        assert!(ask(at, b"GET /metrics HTTP/1.0\r\n\r\n").contains("fsys_info"));
    }
}

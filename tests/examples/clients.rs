//! Many clients of one `node serve`, who come and go at random, and the memory of the server meanwhile.
//!
//!     cargo build --release -p node && cargo run --release -p tests --example clients -- 100 60
//!
//! The first number is that of the clients, the second the seconds that they stay. Each asks again and again: for whole
//! answers, for streams that it reads to their end or leaves in the middle, for more than there is room for, for nonsense. At
//! the end the server must have answered, and its memory must not have grown in the second half.

#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::{Client, Node, Workspace, read, text};

/// Growth of the server's memory between the middle and the end that is noise, in MiB.
const NOISE: u64 = 24;

/// Numbers that look random (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % most
    }
}

/// How a visit ended.
type Counts = Arc<Mutex<BTreeMap<String, usize>>>;

fn visit(client: &Client, dice: &mut Dice) -> String {
    let tokens = 1 + dice.below(60);
    let body = |stream: bool| -> Value {
        json!({"model": "model", "prompt": "What is", "max_tokens": tokens, "ignore_eos": true, "stream": stream})
    };
    let send = |body: &Value| {
        let mut stream = client.connect();
        stream.write_all(&client.request("POST", "/v1/completions", Some(&body.to_string()))).map(|()| stream)
    };
    match dice.below(6) {
        0 | 1 => client.post("/v1/completions", &body(false)).status.to_string(),
        2 => match send(&body(true)) {
            Ok(stream) => {
                let response = read(stream);
                let complete = response.body.ends_with("data: [DONE]\n\n");
                if complete { "stream read".into() } else { response.status.to_string() }
            }
            Err(_) => "refused".into(),
        },
        // Leaves in the middle, or before anything came.
        3 => match send(
            &json!({"model": "model", "prompt": "a", "max_tokens": 5000, "ignore_eos": true, "stream": true}),
        ) {
            Ok(mut stream) => {
                let mut some = vec![0; 1 + dice.below(4000) as usize];
                let _ = stream.read(&mut some);
                "left".into()
            }
            Err(_) => "refused".into(),
        },
        4 => client.post("/v1/completions", &json!({"model": "model", "prompt": 5})).status.to_string(),
        _ => {
            drop(client.connect());
            "knocked".into()
        }
    }
}

/// Resident memory of a process in MiB.
fn memory(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>().unwrap());
    let (clients, seconds) = (arguments.next().unwrap_or(50), arguments.next().unwrap_or(30));
    let workspace = Workspace::new();
    let model = workspace.model_for("model", 2, 1 << 14);
    let mut node = Node::start([
        "serve",
        "--backend",
        "plain",
        "--http",
        "127.0.0.1:0",
        "--model",
        text(&model),
        "--most-answers",
        "32",
        "--text-memory",
        "16",
    ]);
    let client = Client::of(&mut node);
    let (counts, over) = (Counts::default(), Arc::new(AtomicBool::new(false)));
    let visitors: Vec<_> = (0..clients)
        .map(|number| {
            let (client, counts, over) = (client.clone(), Arc::clone(&counts), Arc::clone(&over));
            thread::spawn(move || {
                let mut dice = Dice(number * 2_654_435_769 + 1);
                while !over.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(dice.below(400)));
                    *counts.lock().unwrap().entry(visit(&client, &mut dice)).or_default() += 1;
                }
            })
        })
        .collect();
    let since = Instant::now();
    let (mut middle, mut last) = (0, 0);
    while since.elapsed() < Duration::from_secs(seconds) {
        thread::sleep(Duration::from_secs(1));
        last = memory(node.id());
        if since.elapsed() < Duration::from_secs(seconds / 2) {
            middle = middle.max(last);
        }
        if since.elapsed().as_secs().is_multiple_of(5) {
            println!("{:>4} s  {last} MiB", since.elapsed().as_secs());
        }
    }
    over.store(true, Ordering::Relaxed);
    for visitor in visitors {
        visitor.join().unwrap();
    }
    println!("{:?}", counts.lock().unwrap());
    println!("memory: {middle} MiB at most in the first half, {last} MiB at the end");
    assert_eq!(client.post("/v1/completions", &json!({"model": "model", "prompt": "a"})).status, 200);
    assert!(last <= middle + NOISE, "the server's memory grows");
    node.interrupt();
    node.finish().succeeded();
}

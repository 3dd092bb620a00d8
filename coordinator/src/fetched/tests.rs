//! Fetching from a directory that stands in for a store.

use cohort_objects::{Bucket, Location, Source};

use super::*;

struct Scene {
    directory: tempfile::TempDir,
    home: Home,
    bucket: Bucket,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::open(&directory.path().join("home")).unwrap();
        let url = format!("file://{}/store", directory.path().display());
        let bucket = Bucket::open(&Location::parse(&url).unwrap()).unwrap();
        Self {
            directory,
            home,
            bucket,
        }
    }

    async fn named(&self) -> Vec<Named> {
        let listed = self.bucket.list("").await.unwrap();
        let named = listed.into_iter().map(|meta| Named {
            name: format!("s3://b/{}", meta.name),
            bytes: Some(meta.bytes),
            found: Found::There(Source::Object(self.bucket.clone(), meta)),
        });
        named.collect()
    }
}

#[tokio::test]
async fn files_come_in_order_and_only_once() {
    let scene = Scene::new();
    let names: Vec<String> = (0..9).map(|i| format!("{i}.txt")).collect();
    for name in &names {
        scene
            .bucket
            .write(name, format!("text of {name}").into())
            .await
            .unwrap();
    }
    let told = Mutex::new(Progress { done: 0, total: 0 });
    let tell = |progress| *told.lock().unwrap() = progress;
    let brought = bring(&scene.home, scene.named().await, &tell)
        .await
        .unwrap();
    for (name, file) in names.iter().zip(&brought) {
        assert_eq!(file.name, format!("s3://b/{name}"));
        assert_eq!(
            fs::read_to_string(&file.path).unwrap(),
            format!("text of {name}")
        );
    }
    let all = 9 * "text of 0.txt".len() as u64;
    assert_eq!(
        *told.lock().unwrap(),
        Progress {
            done: all,
            total: all
        }
    );
    // What is known is not read again: the store may even have lost it.
    let named = scene.named().await;
    fs::remove_file(scene.directory.path().join("store/3.txt")).unwrap();
    let again = bring(&scene.home, named, &tell).await.unwrap();
    assert_eq!(again, brought);
    // What changed is another file.
    scene
        .bucket
        .write("3.txt", b"other".to_vec())
        .await
        .unwrap();
    let other = bring(&scene.home, scene.named().await, &tell)
        .await
        .unwrap();
    assert_eq!(fs::read_to_string(&other[3].path).unwrap(), "other");
    let parts = fs::read_dir(scene.home.fetched()).unwrap().flatten();
    assert!(
        parts
            .into_iter()
            .all(|entry| entry.path().extension().unwrap() == "json")
    );
}

#[tokio::test]
async fn a_content_that_was_deleted_is_fetched_again() {
    let scene = Scene::new();
    scene.bucket.write("a.txt", b"text".to_vec()).await.unwrap();
    let bring = || async {
        bring(&scene.home, scene.named().await, &|_| {})
            .await
            .unwrap()
    };
    let path = bring().await[0].path.clone();
    fs::remove_file(&path).unwrap();
    assert_eq!(bring().await[0].path, path);
    assert!(path.is_file());
}

#[tokio::test]
async fn what_nobody_can_go_on_with_does_not_stay() {
    let scene = Scene::new();
    scene.bucket.write("a.txt", b"text".to_vec()).await.unwrap();
    let mut named = scene.named().await;
    let Found::There(Source::Object(_, meta)) = &mut named[0].found else {
        panic!("an object");
    };
    // Nobody says when it changes; and it is shorter than the list said.
    (meta.version, meta.bytes) = (None, 99);
    let error = bring(&scene.home, named, &|_| {}).await.unwrap_err();
    assert!(matches!(error, ObjectError::Changed { .. }), "{error}");
    let left = fs::read_dir(scene.home.fetched()).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test]
async fn each_query_of_a_path_is_a_file() {
    let named = async |url: &str| {
        let location = Location::parse(url).unwrap();
        let named = find(&location, Reach::ThisMachine).await.unwrap();
        named.into_iter().next().unwrap()
    };
    let (one, two) = (
        named("https://h/get?id=1").await,
        named("https://h/get?id=2").await,
    );
    assert_eq!((one.name.as_str(), &one.name), ("https://h/get", &two.name));
    assert_ne!(one.identity(), two.identity());
    assert_eq!(one.identity(), named("https://h/get?id=1").await.identity());
}

#[test]
fn only_this_machines_users_may_name_this_machine() {
    let reach = |address: &str| reach_of(Some(address.parse().unwrap()));
    assert_eq!(reach("127.0.0.1:1"), Reach::ThisMachine);
    assert_eq!(reach("[::1]:1"), Reach::ThisMachine);
    assert_eq!(reach("[::ffff:127.0.0.1]:1"), Reach::ThisMachine);
    assert_eq!(reach("10.0.0.7:1"), Reach::Network);
    assert_eq!(reach_of(None), Reach::Network);
}

from sqlalchemy import text
def test_db(database, broker, storage, tmp_path):
    with database.unit_of_work() as s: s.execute(text("select count(*) from jobs"))
    p = tmp_path/"x"; p.write_bytes(b"abc"*1000)
    from service.storage import file_sha256
    storage.put_file("a/b", p, file_sha256(p))
    assert b"".join(storage.read("a/b", 1, 4)) == b"bcab"
    assert list(storage.keys("a")) == ["a/b"]
    storage.delete_prefix("a"); storage.check()
    assert list(storage.keys("a")) == []

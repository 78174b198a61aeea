SELECT @@skip_networking;
SELECT user FROM mysql.global_priv ORDER BY user;
SELECT DISTINCT table_schema FROM information_schema.schema_privileges WHERE grantee LIKE '\'slurm\'%';

/* A fake: SoftHSM with one fault, for what SoftHSM never does by itself. It is a PKCS#11 module of its own, named as such
   where it is used; what it does stands in the environment.
     FAULTY_HSM_MODULE      the module behind it
     FAULTY_HSM_LOGINS      a file that gets one line a C_Login
     FAULTY_HSM_FLAGS       flags added to each token's
     FAULTY_HSM_SLOW        seconds that C_Login takes
     FAULTY_HSM_NO_DERIVE   C_DeriveKey returns this, as pkcs11-proxy does for CKM_ECDH1_DERIVE
     FAULTY_HSM_GONE        every C_FindObjectsInit returns CKR_DEVICE_REMOVED
     FAULTY_HSM_CRASH       C_Login ends the process
     FAULTY_HSM_WRONG       C_GetAttributeValue of a derived secret gives it with one bit turned */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long word;
typedef word (*function)();
typedef struct { unsigned char version[2]; function functions[68]; } list;
typedef struct { unsigned char names[96]; word flags; } token_info;
typedef struct { word kind; unsigned char *value; word length; } attribute;

static list faulty, *real;

static word slow(const char *name) {
    if (getenv(name)) sleep(atoi(getenv(name)));
    return 0;
}

static word get_token_info(word slot, token_info *info) {
    word code = real->functions[6](slot, info);
    if (getenv("FAULTY_HSM_FLAGS")) info->flags |= strtoul(getenv("FAULTY_HSM_FLAGS"), NULL, 0);
    return code;
}

static word login(word session, word who, unsigned char *pin, word length) {
    if (getenv("FAULTY_HSM_LOGINS")) {
        FILE *file = fopen(getenv("FAULTY_HSM_LOGINS"), "a");
        fputs("login\n", file);
        fclose(file);
    }
    if (getenv("FAULTY_HSM_CRASH")) _exit(139);
    slow("FAULTY_HSM_SLOW");
    return real->functions[18](session, who, pin, length);
}

static word find_objects_init(word session, attribute *wanted, word count) {
    return getenv("FAULTY_HSM_GONE") ? 0x32 : real->functions[26](session, wanted, count);
}

static word get_attribute_value(word session, word object, attribute *wanted, word count) {
    word code = real->functions[24](session, object, wanted, count);
    if (getenv("FAULTY_HSM_WRONG") && code == 0 && wanted->kind == 0x11 && wanted->value) wanted->value[0] ^= 1;
    return code;
}

static word derive_key(word session, void *how, word key, void *wanted, word count, word *handle) {
    if (getenv("FAULTY_HSM_NO_DERIVE")) return strtoul(getenv("FAULTY_HSM_NO_DERIVE"), NULL, 0);
    return real->functions[62](session, how, key, wanted, count, handle);
}

word C_GetFunctionList(list **out) {
    void *library = dlopen(getenv("FAULTY_HSM_MODULE"), RTLD_NOW);
    word (*get)(list **) = library ? dlsym(library, "C_GetFunctionList") : NULL;
    if (!get || get(&real) != 0) return 5;
    faulty = *real;
    faulty.functions[6] = (function)get_token_info;
    faulty.functions[18] = (function)login;
    faulty.functions[24] = (function)get_attribute_value;
    faulty.functions[26] = (function)find_objects_init;
    faulty.functions[62] = (function)derive_key;
    *out = &faulty;
    return 0;
}
